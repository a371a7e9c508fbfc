"""`gradctl memory SCRIPT`: a step of an unmodified script is measured, and the script is what it was."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from gradctl import MemoryReport
from gradctl._journal import Run
from starting import environment, launch

GRADCTL = (sys.executable, "-m", "gradctl", "memory")
PROGRAM = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 500))
optimizer = torch.optim.AdamW(model.parameters())
for step in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
    x, y = torch.randn(256, 64), torch.randint(0, 500, (256,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    print(f"{step} {loss.item():.17g} {torch._C._len_torch_dispatch_stack()}")
"""
FORWARD = 1 + PROGRAM.splitlines().index("    loss = nn.functional.cross_entropy(model(x), y)")
WEIGHTS = (64 * 256 + 256 + 256 * 500 + 500) * 4


def program(folder: Path, text: str = PROGRAM) -> Path:
    (folder / "train.py").write_text(text, encoding="utf-8")
    return folder


def measured(folder: Path, *words: str, script: tuple[str, ...] = ("train.py",)) -> Any:
    return launch([*GRADCTL, "--out", "run", *words, *script], folder, env=environment())


def told(done: Any) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("gradctl: ")]


def test_the_third_step_is_measured_and_its_figures_are_those_of_the_model(tmp_path: Path) -> None:
    done = measured(program(tmp_path), "--no-report", "--json", "memory.json")
    assert done.code == 0
    assert told(done)[0] == "gradctl: memory of step 3"
    report = MemoryReport.from_json((tmp_path / "memory.json").read_text(encoding="utf-8"))
    found = report.by_category()
    assert found["weights"] == WEIGHTS
    assert found["optimizer state"] == 2 * WEIGHTS + 4 * 4, "two moments, and a step count for each tensor"
    assert found["inputs"] == 256 * 64 * 4
    hidden, logits = 256 * 256 * 4, 256 * 500 * 4
    assert report.saved_bytes == hidden + logits + 256 * 8 + 4, "relu, log-probabilities, targets, total weight"
    assert report.peak_bytes >= 3 * WEIGHTS + hidden + 2 * logits
    assert [row.where for row in report.saved_by_line] == [f"train.py:{FORWARD} <module>"]
    assert report.remarks == ()


def test_the_script_prints_what_it_prints_alone_and_nothing_of_ours_stays(tmp_path: Path) -> None:
    done = measured(program(tmp_path), "--no-report")
    plain = launch([sys.executable, "train.py"], tmp_path)
    metered, alone = done.stdout.splitlines(), plain.stdout.splitlines()
    assert [line.split()[:2] for line in metered] == [line.split()[:2] for line in alone]
    # The measured step, the third, is under a mode from the second optimizer step to the third.
    assert [line.split()[2] for line in metered] == ["0", "1", "0", "0", "0"]


def test_json_on_stdout_is_alone_there(tmp_path: Path) -> None:
    done = measured(program(tmp_path), "--no-report", "--json", "-")
    assert json.loads(done.stdout)["schema"] == "gradctl.memory/1"
    assert "4 6." in done.stderr


def test_another_step_can_be_measured_and_the_exit_code_is_the_scripts(tmp_path: Path) -> None:
    done = measured(program(tmp_path, PROGRAM + "sys.exit(7)\n"), "--no-report", "--step", "5")
    assert done.code == 7
    assert told(done)[0] == "gradctl: memory of step 5"


def test_too_few_steps_are_told(tmp_path: Path) -> None:
    done = measured(program(tmp_path), "--no-report", script=("train.py", "1"))
    assert done.code == 0
    assert told(done)[0] == (
        "gradctl: no step was measured: the script made 1 optimizer step, and step 3 was to be measured "
        "(--step N, 2 or more)"
    )


def test_a_script_that_fails_in_the_measured_step_fails_as_it_would(tmp_path: Path) -> None:
    text = PROGRAM.replace("    loss.backward()", "    if step == 2: raise KeyError('mine')\n    loss.backward()")
    done = measured(program(tmp_path, text), "--no-report")
    assert done.code == 1
    assert "KeyError: 'mine'" in done.stderr
    assert "gradctl: no step was measured: the script ended in step 3" in told(done)


def test_a_program_without_an_optimizer_is_measured_from_backward_to_backward(tmp_path: Path) -> None:
    text = PROGRAM.replace("optimizer = torch.optim.AdamW(model.parameters())\n", "").replace(
        "    optimizer.zero_grad()\n", "    model.zero_grad()\n"
    ).replace("    optimizer.step()\n", "")  # fmt: skip
    done = measured(program(tmp_path, text), "--no-report", "--json", "memory.json", script=("train.py", "12"))
    report = MemoryReport.from_json((tmp_path / "memory.json").read_text(encoding="utf-8"))
    assert done.code == 0
    assert report.by_category()["weights"] == WEIGHTS
    assert report.by_category()["optimizer state"] == 0


def test_a_dispatch_mode_of_the_program_is_left_alone(tmp_path: Path) -> None:
    text = PROGRAM.replace("for step in", "from torch.utils.flop_counter import FlopCounterMode\nfor step in").replace(
        "    optimizer.step()\n", "    with FlopCounterMode(display=False):\n        optimizer.step()\n"
    )
    done = measured(program(tmp_path, text), "--no-report")
    assert done.code == 0
    assert told(done)[0] == (
        "gradctl: no step was measured: a dispatch mode of the program is on, and ours could not be taken away under it"
    )


def test_the_journal_keeps_the_report_and_the_page_draws_it(tmp_path: Path) -> None:
    done = measured(program(tmp_path))
    assert told(done)[-1] == f"gradctl: page {tmp_path / 'run' / 'report.html'}"
    [event] = Run.load(tmp_path / "run").journals[0].named("memory")
    assert event.n == 3
    assert event.data["schema"] == "gradctl.memory/1"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "The memory of step 3" in page
    assert f"train.py:{FORWARD} &lt;module&gt;" in page
    assert len(page) < 100_000


def test_the_snapshot_is_read_by_torchs_own_viewer(tmp_path: Path) -> None:
    from torch.cuda import _memory_viz

    measured(program(tmp_path), "--no-report", "--pickle", "memory.pickle", "--json", "memory.json")
    with (tmp_path / "memory.pickle").open("rb") as file:
        snapshot = pickle.load(file)
    report = MemoryReport.from_json((tmp_path / "memory.json").read_text(encoding="utf-8"))
    alive = peak = 0
    sizes: dict[int, int] = {}
    for event in snapshot["device_traces"][0]:
        if event["action"] == "alloc":
            assert event["addr"] not in sizes
            sizes[event["addr"]] = event["size"]
            alive += event["size"]
        elif event["action"] == "free_completed":
            alive -= sizes.pop(event["addr"])
        peak = max(peak, alive)
    assert peak == report.peak_bytes - report.workspace_bytes
    assert sum(segment["requested_size"] for segment in snapshot["segments"]) == alive
    assert f"segments: {len(snapshot['segments'])}\n" in _memory_viz.segsum(snapshot)
    assert ("train.py", FORWARD) in {
        (frame["filename"], frame["line"]) for event in snapshot["device_traces"][0] for frame in event["frames"]
    }
    assert "<html" in _memory_viz.trace_plot(snapshot).lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--step", "1", "train.py"), "1 is not in the range"),
        (("missing.py",), "there is no script missing.py"),
        ((), "Missing SCRIPT, -m MODULE or -c CODE"),
        (("--json", "train.py", "train.py"), "train.py exists and is not overwritten"),
        (("-I", "train.py"), "nothing can be measured under `python -I`"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = launch([*GRADCTL, *words], program(tmp_path), env=environment())
    assert done.code == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]
