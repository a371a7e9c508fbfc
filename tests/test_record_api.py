"""`gradctl.record()`: the same recorder for programs that start themselves, undone exactly."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
import torch

import gradctl
from gradctl import _taps
from starting import SCRIPTS, journal_lines, launch, recorded, run_directory


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(steps: int) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters())
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_block_is_recorded_and_nothing_stays_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untouched = train(20)
    exit_before, descriptors = os._exit, len(os.listdir("/proc/self/fd"))
    with gradctl.record() as recording:
        assert os._exit is not exit_before
        recorded_losses = train(20)
    assert recorded_losses == untouched
    assert _taps.installed() == []
    assert os._exit is exit_before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    train(5)
    journal = recording.journal
    assert journal.run is not None
    assert (journal.run.start, journal.run.main) == ("record", True)
    assert journal.end is not None
    assert (journal.end.how, journal.end.steps) == ("stopped", {0: 20})
    assert recording.directory.parent == tmp_path / "gradctl-runs"
    assert stat.S_IMODE((recording.directory / "journal.rank0.jsonl").stat().st_mode) == 0o600
    assert recording.summary()["schema"] == "gradctl.summary/1"
    page = recording.directory / "report.html"
    assert page.is_file()
    assert capsys.readouterr() == ("", "")  # what is said goes past Python's streams, as a line on the real stderr
    assert "20" in str(recording).partition("steps")[2].splitlines()[0]
    assert recording._repr_html_().startswith("<iframe")


def test_a_handle_can_be_asked_while_it_records_and_stopped_twice() -> None:
    recording = gradctl.record("here", report=False, quiet=True)
    assert "● " in str(recording)
    assert "30" not in str(recording)
    train(30)
    assert recording._repr_html_().startswith("<pre>")
    assert sum(block.c for block in recording.journal.blocks) > 0
    assert recording.journal.end is None
    assert "running" in repr(recording)
    recording.stop()
    recording.stop()
    assert "stopped" in repr(recording)
    assert sum(block.c for block in recording.journal.blocks) == 30
    assert os.listdir("here") == ["journal.rank0.jsonl"]


def test_a_second_recording_is_refused_until_the_first_has_stopped() -> None:
    with gradctl.record("one", quiet=True), pytest.raises(gradctl.UsageError, match="recording already") as caught:
        gradctl.record("two")
    assert "one" in str(caught.value)
    assert "recording.stop()" in str(caught.value)
    assert not Path("two").exists()
    with gradctl.record("two", quiet=True) as again:
        train(2)
    assert again.journal.end is not None
    assert again.journal.end.steps == {0: 2}


def test_an_exception_passes_and_is_told() -> None:
    def fail() -> None:
        with gradctl.record("out", quiet=True, report=False):
            train(3)
            raise ZeroDivisionError("by hand")

    with pytest.raises(ZeroDivisionError):
        fail()
    end = journal_lines(Path("out/journal.rank0.jsonl"))[-1]
    assert (end["exc"]["type"], end["exc"]["message"]) == ("ZeroDivisionError", "by hand")
    assert end["exc"]["file"] == __file__


def test_a_directory_in_use_and_a_wrong_argument_are_refused_before_anything_is_touched() -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    with pytest.raises(gradctl.RunDirectoryError, match="in use"):
        gradctl.record("out")
    with pytest.raises(gradctl.UsageError, match="budget"):
        gradctl.record(budget=2.0)
    assert _taps.installed() == []
    assert not Path("gradctl-runs").exists()


def test_a_gradient_that_is_not_finite_stops_the_program_when_that_is_asked() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with gradctl.record("out", quiet=True, report=False, on_nonfinite="stop"):
        (weight * float("nan")).sum().backward()
        with pytest.raises(gradctl.NonFiniteGradient):
            optimizer.step()
    assert weight.detach().tolist() == [1.0, 1.0, 1.0]


def test_a_forked_child_leaves_the_recording_to_its_parent() -> None:
    recording = gradctl.record("out", quiet=True, report=False)
    train(3)
    child = os.fork()
    if child == 0:
        train(4)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    idle = os.fork()
    if idle == 0:
        os._exit(0)
    os.waitpid(idle, 0)
    recording.stop()
    assert sorted(os.listdir("out")) == ["journal.rank0.jsonl", f"journal.rank0.pid{child}.jsonl"]
    assert recording.journal.end is not None
    assert recording.journal.end.children == (child,)
    assert (
        sum(line["c"] for line in journal_lines(Path(f"out/journal.rank0.pid{child}.jsonl")) if line["k"] == "b") == 4
    )


PROGRAM = """
import sys, gradctl
sys.path.insert(0, {scripts!r})
from training import steps
recording = gradctl.record()
steps(10)
print(repr(recording).split()[-1])
{rest}
"""


def test_a_program_that_never_stops_its_recording_still_ends_it(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(PROGRAM.format(scripts=str(SCRIPTS), rest="sys.exit(3)"))
    ours = launch([sys.executable, "own.py"], tmp_path)
    assert (ours.code, ours.stdout) == (3, "(running)>\n")
    assert ours.stderr == f"gradctl: report  {run_directory(tmp_path) / 'report.html'}\n"
    end = journal_lines(run_directory(tmp_path) / "journal.rank0.jsonl")[-1]
    assert (end["how"], end["steps"]) == ("exit", {"0": 10})


def test_under_gradctl_run_a_recording_joins_the_run(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    rest = "print(recording.journal.run.start); recording.stop(); steps(5)"
    script.write_text(PROGRAM.format(scripts=str(SCRIPTS), rest=rest))
    ours = recorded("-q", "own.py", cwd=tmp_path)
    assert (ours.code, ours.stdout, ours.stderr) == (0, "run`)>\nrun\n", "")
    end = journal_lines(run_directory(tmp_path) / "journal.rank0.jsonl")[-1]
    assert (end["how"], end["steps"]) == ("exit", {"0": 15})


def test_under_gradctl_run_a_recording_that_asks_for_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import gradctl\n"
        "asked = {'on_nonfinite': 'stop', 'out': 'there', 'lines': True, 'watch_steps': 3, 'grad': 'off'}\n"
        "for key, value in asked.items():\n"
        "    try:\n        gradctl.record(**{key: value})\n"
        "    except gradctl.UsageError as error:\n        print(error)\n"
        "gradctl.record('here', on_nonfinite='continue', lines=False, budget=0.02, quiet=False, name='mine')\n"
    )
    ours = recorded("-q", "--out", "here", "--budget", "0.02", "own.py", cwd=tmp_path)
    assert (ours.code, ours.stderr) == (0, "")
    assert [line.split("=")[0] for line in ours.stdout.splitlines() if line.startswith("record(")] == [
        "record(on_nonfinite", "record(out", "record(lines", "record(watch_steps", "record(grad",
    ]  # fmt: skip
    assert "start it with gradctl run --on-nonfinite stop" in ours.stdout
    assert "start it with gradctl run --lines\n" in ours.stdout


def test_a_directory_in_use_can_be_taken_when_that_is_asked() -> None:
    with gradctl.record("out", quiet=True, report=False):
        train(2)
    with pytest.raises(gradctl.RunDirectoryError, match=r"force=True"):
        gradctl.record("out")
    with gradctl.record("out", quiet=True, report=False, force=True) as again:
        train(3)
    assert again.journal.end is not None
    assert again.journal.end.steps == {0: 3}
    Path("file").write_text("mine")
    with pytest.raises(gradctl.RunDirectoryError, match="is a file") as caught:
        gradctl.record("file", force=True)
    assert "--force" not in str(caught.value)


def test_a_recording_may_keep_gradients_off() -> None:
    with gradctl.record("out", quiet=True, report=False, grad="off") as recording:
        assert gradctl.is_off()
        with pytest.raises(gradctl.BackwardRefused):
            torch.ones(2, requires_grad=True).sum().backward()
    assert not gradctl.is_off()
    assert recording.journal.run is not None
    assert recording.journal.run.grad == "off"
