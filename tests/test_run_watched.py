"""`--watch-steps N` and `record(watch_steps=N)`: the first steps are recorded and traced, the rest is left alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl
from gradctl import _taps
from starting import GRADCTL, environment, launch

pytestmark = pytest.mark.usefixtures("no_optimizers_of_other_tests")

PROGRAM = """
import torch
from torch import nn

torch.manual_seed(0)
tower, head = nn.Linear(4, 4), nn.Linear(4, 1)
optimizer = torch.optim.SGD([*tower.parameters(), *head.parameters()], lr=0.1)
for step in range(6):
    hidden = tower(torch.randn(8, 4))
    hidden = hidden.tanh()CUT
    loss = head(hidden).pow(2).mean()
    optimizer.zero_grad()
    ERROR
    loss.backward()
    optimizer.step()
    print(f"{step} {loss.item():.17g} {torch._C._len_torch_function_stack()}")
"""
LINE = 1 + PROGRAM.splitlines().index("    hidden = hidden.tanh()CUT")


def program(folder: Path, *, cut: str = "", error: str = "") -> Path:
    text = PROGRAM.replace("CUT", cut).replace("ERROR", f"if step == 1: {error}" if error else "pass")
    (folder / "train.py").write_text(text, encoding="utf-8")
    return folder


def told(folder: Path) -> list[dict[str, Any]]:
    """The events `explain` of the run that was recorded there."""
    (journal,) = folder.glob("run/journal.rank0.jsonl")
    records = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["k"] == "event" and record["e"] == "explain"]


def ran(folder: Path, *words: str, **options: Any) -> Any:
    return launch([*GRADCTL, "--out", "run", "--no-report", *words, "train.py"], folder, env=environment(), **options)


def test_a_cut_in_the_first_steps_is_told_with_its_line_and_kept_in_the_journal(tmp_path: Path) -> None:
    done = ran(program(tmp_path, cut=".detach()"), "--watch-steps", "3")
    assert done.code == 0
    assert "gradctl: 1 cause found in the gradients of 3 steps\n" in done.stderr
    assert f"detach   train.py:{LINE}\n" in done.stderr
    assert f">   {LINE:>2} |     hidden = hidden.tanh().detach()\n" in done.stderr
    assert "fix       write `hidden = hidden.tanh()`" in done.stderr
    [event] = told(tmp_path)
    assert event["text"] == "1 cause found in the gradients of 3 steps"
    [finding] = event["findings"]
    assert (finding["slug"], finding["primary"]) == ("detach", {"file": "train.py", "line": LINE})


def test_where_nothing_is_wrong_one_line_says_so_and_the_run_is_what_it_was(tmp_path: Path) -> None:
    done = ran(program(tmp_path), "--watch-steps", "3")
    lines = [line for line in done.stderr.splitlines() if line.startswith("gradctl: ")]
    assert lines == ["gradctl: nothing is wrong with the gradients of 3 steps"]
    assert [event["findings"] for event in told(tmp_path)] == [[]]
    plain = launch([sys.executable, "train.py"], tmp_path)
    losses = [line.split()[:2] for line in done.stdout.splitlines()]
    assert losses == [line.split()[:2] for line in plain.stdout.splitlines()]
    assert len(losses) == 6
    # Traced for three steps; from the fourth on nothing stands between the program and torch.
    assert [line.split()[2] for line in done.stdout.splitlines()][3:] == ["0", "0", "0"]


def test_an_error_ends_the_trace_and_is_explained(tmp_path: Path) -> None:
    done = ran(program(tmp_path, error="loss = loss.detach()"), "--watch-steps", "3")
    assert done.code == 1
    assert done.stderr.index("Traceback") < done.stderr.index("gradctl: 1 cause found in the gradients of 1 step")
    assert f"detach   train.py:{PROGRAM.splitlines().index('    ERROR') + 1}\n" in done.stderr


@pytest.mark.slow
def test_a_program_that_ends_before_its_steps_are_made_is_told_of_those_it_made(tmp_path: Path) -> None:
    done = ran(program(tmp_path, cut=".detach()"), "--watch-steps", "40")
    assert "gradctl: 1 cause found in the gradients of 6 steps\n" in done.stderr


@pytest.mark.slow
def test_a_quiet_run_keeps_it_in_the_journal_only(tmp_path: Path) -> None:
    done = ran(program(tmp_path, cut=".detach()"), "--watch-steps", "3", "-q")
    assert done.stderr == ""
    assert [finding["slug"] for finding in told(tmp_path)[0]["findings"]] == ["detach"]


@pytest.mark.slow
def test_without_the_option_nothing_is_traced(tmp_path: Path) -> None:
    done = ran(program(tmp_path, cut=".detach()"))
    assert "cause" not in done.stderr
    assert told(tmp_path) == []
    assert {line.split()[2] for line in done.stdout.splitlines()} == {"0"}


def test_a_script_that_does_not_train_is_told_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import torch\nprint(torch.ones(2).sum().item())\n", encoding="utf-8")
    done = ran(tmp_path, "--watch-steps", "3")
    assert (done.code, done.stdout) == (0, "2.0\n")
    assert "gradients of" not in done.stderr
    assert "gradctl: " not in done.stderr


@pytest.mark.slow
def test_a_trace_of_the_program_takes_the_place_of_ours(tmp_path: Path) -> None:
    text = (program(tmp_path, cut=".detach()") / "train.py").read_text(encoding="utf-8")
    text = text.replace("for step", "import gradctl\nseen = gradctl.watch(steps=2, quiet=True).start()\nfor step")
    (tmp_path / "train.py").write_text(text + "print([one.slug for one in seen.findings])\n", encoding="utf-8")
    done = ran(tmp_path, "--watch-steps", "3")
    assert done.code == 0
    assert done.stdout.endswith("['detach']\n")
    assert "the program traces its steps itself" in done.stderr


def train(steps: int, *, cut: bool) -> list[Tensor]:
    torch.manual_seed(0)
    tower, head = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizer = torch.optim.SGD([*tower.parameters(), *head.parameters()], lr=0.1)
    for _ in range(steps):
        hidden = tower(torch.randn(8, 4))
        loss = head(hidden.detach() if cut else hidden).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in (*tower.parameters(), *head.parameters())]


def test_a_recording_traces_its_first_steps_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = train(6, cut=True)
    with gradctl.record(tmp_path / "run", report=False, watch_steps=3) as recording:
        watched = train(6, cut=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    [event] = recording.journal.named("explain")
    [finding] = event.data["findings"]
    assert finding["slug"] == "detach"
    assert "gradctl: 1 cause found in the gradients of 3 steps\n" in capfd.readouterr().err
    assert _taps.installed() == []


def test_a_recording_that_is_stopped_earlier_tells_what_it_has_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with gradctl.record(tmp_path / "run", report=False, watch_steps=30):
        train(4, cut=False)
    assert capfd.readouterr().err == "gradctl: nothing is wrong with the gradients of 4 steps\n"
    assert torch._C._len_torch_function_stack() == 0


def test_an_error_that_leaves_a_recording_is_explained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def train_wrongly() -> None:
        with gradctl.record(tmp_path / "run", report=False, watch_steps=3):
            loss = nn.Linear(2, 1)(torch.ones(1, 2)).sum().detach()
            loss.backward()

    with pytest.raises(RuntimeError, match="does not require grad"):
        train_wrongly()
    assert "gradctl: 1 cause found in the gradients of 0 steps\n" in (told_there := capfd.readouterr().err)
    assert "error     detach   " in told_there


def test_gradients_that_are_off_are_not_traced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with gradctl.record(tmp_path / "run", report=False, watch_steps=3, grad="off") as recording:
        nn.Linear(2, 1)(torch.ones(1, 2))
    assert recording.journal.named("explain") == ()
    assert capfd.readouterr().err == ""


def test_recordings_add_no_fork_handler_that_stays_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[Any] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **handlers: added.append(handlers))
    for name in ("a", "b"):
        with gradctl.record(tmp_path / name, report=False, watch_steps=2, quiet=True):
            train(3, cut=False)
    assert added == []
