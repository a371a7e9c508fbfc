from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import journals
from gradctl import report
from gradctl._journal import Run
from gradctl._results import Finding
from journals import NAN, Trainer, event, goodbye, gpt, header

RANK = {
    "rank": int, "pid": int, "ended": str | None, "steps": int, "backwards": int, "optimizers": list,
    "nonfinite_steps": int, "skipped_steps": int, "loss": dict, "recorder": dict,
}  # fmt: skip


def summary(directory: Path) -> dict[str, Any]:
    found = report.summary(Run.load(directory))
    return json.loads(json.dumps(found, allow_nan=False, ensure_ascii=False).encode("utf-8"))


@pytest.mark.parametrize("kind", journals.ALL)
def test_the_summary_has_the_fields_that_others_script_against(tmp_path: Path, kind: str) -> None:
    found = summary(journals.ALL[kind](tmp_path))
    assert list(found) == ["schema", "script", "exit_code", "verdict", "findings", "ranks"]
    assert found["schema"] == "gradctl.summary/1"
    for rank in found["ranks"]:
        assert list(rank) == list(RANK)
        assert all(isinstance(rank[key], kind) for key, kind in RANK.items())
        assert list(rank["loss"]) == ["first", "last"]
        assert list(rank["recorder"]) == ["share", "faults", "not_seen"]
        assert all(list(optimizer) == ["class", "parameters", "reached"] for optimizer in rank["optimizers"])
    for finding in found["findings"]:
        assert list(finding) == [
            "slug", "severity", "confidence", "symptom", "primary", "evidence", "parameters", "path", "why", "fix",
            "measured",
        ]  # fmt: skip
        assert Finding.from_json(finding).to_json() == finding


def test_a_healthy_run(tmp_path: Path) -> None:
    found = summary(journals.healthy(tmp_path))
    assert (found["script"], found["exit_code"]) == ("train.py", 0)
    assert found["verdict"] == "Gradients reach every parameter and the loss falls."
    assert [f["severity"] for f in found["findings"]] == ["note"]
    (rank,) = found["ranks"]
    assert rank["optimizers"] == [{"class": "AdamW", "parameters": 52, "reached": 52}]
    assert rank["loss"]["first"] == pytest.approx(4.43, rel=0.01)
    assert rank["loss"]["last"] == pytest.approx(2.45, rel=0.05)
    assert rank["recorder"] == {"share": 0.007, "faults": 0, "not_seen": []}
    assert (rank["rank"], rank["pid"], rank["ended"], rank["steps"], rank["backwards"]) == (0, 4242, "exit", 400, 400)


def test_a_run_that_diverged(tmp_path: Path) -> None:
    found = summary(journals.diverged(tmp_path))
    assert found["findings"][0]["slug"] == "nonfinite-gradient"
    assert found["findings"][0]["measured"] == {"step": 18, "steps": 243, "tensors": 65}
    (rank,) = found["ranks"]
    assert rank["nonfinite_steps"] == 243
    assert rank["loss"]["last"] is None


def test_skipped_steps_are_counted_beyond_what_the_journal_keeps(tmp_path: Path) -> None:
    names, shapes = gpt(1)
    events = [event("skip", 1.0, o=0, n=1, scale=1.0) for _ in range(200)]
    directory = journals.write(
        tmp_path, [Trainer(list(names), shapes, 900)], events=events, end=goodbye({0: 900}, dropped={"skip": 33})
    )
    assert summary(directory)["ranks"][0]["skipped_steps"] == 233


def test_every_rank_and_every_child_that_trained_has_its_row(tmp_path: Path) -> None:
    journals.two_ranks(tmp_path, steps=30)
    directory = tmp_path / "two_ranks"
    journals.write(
        directory, [Trainer(["a"], [[2, 2]], 7)], run=header(pid=77, main=False), name="journal.rank0.pid77.jsonl"
    )
    journals.write(directory, run=header(pid=78, main=False), name="journal.rank0.pid78.jsonl")
    rows = [(rank["rank"], rank["pid"], rank["steps"]) for rank in summary(directory)["ranks"]]
    assert rows == [(0, 900, 30), (1, 901, 30), (0, 77, 7)]


def test_a_killed_run_ended_without_a_word(tmp_path: Path) -> None:
    found = summary(journals.killed(tmp_path))
    assert (found["exit_code"], found["ranks"][0]["ended"], found["ranks"][0]["steps"]) == (None, None, 1012)
    assert found["ranks"][0]["recorder"]["share"] is None


def test_what_was_not_seen_is_said(tmp_path: Path) -> None:
    (rank,) = summary(journals.not_seen(tmp_path))["ranks"]
    assert rank["recorder"]["not_seen"] == [
        "distributed autograd: its backward runs in C++ and no optimizer hook fires"
    ]


def test_an_empty_run_is_still_a_summary(tmp_path: Path) -> None:
    found = summary(journals.empty(tmp_path))
    assert (found["script"], found["exit_code"], found["findings"]) == ("", None, [])


def test_text_that_utf8_cannot_hold_and_numbers_that_json_cannot_are_mended(tmp_path: Path) -> None:
    names = ["\ud800.weight", "b.weight"]
    one = Trainer(list(names), [[4, 4]] * 2, 60, loss=lambda n: NAN)
    events = [event("none", 9.0, o=0, n=60, params=names, count=2)]
    directory = journals.write(tmp_path, [one], run=header(script="\udcff.py"), events=events)
    found = report.summary(Run.load(directory))
    text = json.dumps(found, allow_nan=False, ensure_ascii=False)
    assert json.loads(text.encode("utf-8")) == found


@pytest.mark.parametrize("target", ["-", "out.json"])
def test_the_command_writes_it_to_a_file_or_prints_it(tmp_path: Path, target: str) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    done = subprocess.run(
        [sys.executable, "-m", "gradctl", "report", str(directory), "--json", target],
        check=True, capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    text = done.stdout if target == "-" else (tmp_path / target).read_text()
    assert json.loads(text) == summary(directory)
