"""Programs under `gradctl run`, with the real torch: they end as under plain Python, and their journals are whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from starting import GRADCTL, SCRIPTS, environment, journal_lines, launch, plain, recorded, run_directory


def journals(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Every journal of a run directory, line by line."""
    return {path.name: journal_lines(path) for path in sorted(directory.glob("journal.*.jsonl"))}


def num_steps(lines: list[dict[str, Any]]) -> int:
    """The steps that the blocks of a journal add up to; no step may be told twice."""
    told = [step for line in lines if line["k"] == "b" for step in range(line["n"], line["n"] + line["c"])]
    assert len(told) == len(set(told))
    return len(told)


def test_a_training_script_ends_and_prints_as_under_plain_python(tmp_path: Path) -> None:
    script = SCRIPTS / "whole.py"
    theirs = plain(script, "7", "--api-key", "hunter2", "hf_abcdefghijklmnop", "lr=0.1", cwd=tmp_path)
    ours = recorded("-q", script, "7", "--api-key", "hunter2", "hf_abcdefghijklmnop", "lr=0.1", cwd=tmp_path)
    assert (ours.code, ours.stdout, ours.stderr) == (theirs.code, theirs.stdout, theirs.stderr)
    assert theirs.code == 7
    (lines,) = journals(run_directory(tmp_path)).values()
    assert lines[0]["argv"][1:] == ["7", "--api-key", "[redacted]", "[redacted]", "lr=0.1"]
    assert num_steps(lines) == 25
    end = lines[-1]
    assert (end["k"], end["how"], end["steps"], end["faults"]) == ("end", "exit", {"0": 25}, 0)
    assert end["code"] is None  # `raise SystemExit(7)` leaves no trace
    text = (run_directory(tmp_path) / "journal.rank0.jsonl").read_text()
    assert "hunter2" not in text
    assert "PATH" not in text
    assert (run_directory(tmp_path) / "report.html").is_file()


def test_children_have_journals_of_their_own_and_data_loaders_leave_none(tmp_path: Path) -> None:
    ours = recorded(SCRIPTS / "family.py", cwd=tmp_path)
    assert ours.code == 0
    assert ours.stdout.splitlines() == [
        "no step",
        "workers [0, 0, 5, 0]",
        "forked 3",
        "replaced",
        "executed 0",
        "done",
    ]
    found = journals(run_directory(tmp_path))
    main = found.pop("journal.rank0.jsonl")
    assert num_steps(main) == 20
    assert main[-1]["code"] == 0
    assert sorted(num_steps(lines) for lines in found.values() if lines[-1]["k"] == "end") == [4, 5, 6, 7]
    assert sorted(main[-1]["children"]) == sorted(lines[0]["pid"] for lines in found.values())
    for name, lines in found.items():
        assert name == f"journal.rank0.pid{lines[0]['pid']}.jsonl"
        assert [line["k"] for line in lines].count("run") == 1
        assert (lines[0]["start"], lines[0]["main"], lines[0]["ppid"]) == ("child", False, main[0]["pid"])
    assert f"{len(found)} child processes" in ours.stderr


def killed(tmp_path: Path, times: list[float]) -> None:
    ours = recorded("-q", SCRIPTS / "killed.py", *(f"{seconds:.3f}" for seconds in times), cwd=tmp_path)
    assert ours.code == 0, ours.stderr
    directory = run_directory(tmp_path)
    rows = [line.split() for line in ours.stdout.splitlines()]
    assert len(rows) == len(times)
    for pid, steps, seconds in rows:
        path = directory / f"journal.rank0.pid{pid}.jsonl"
        lines = journal_lines(path)
        assert path.read_bytes().endswith(b"\n")
        assert all(line["k"] != "end" for line in lines)
        seen = num_steps(lines)
        # A steady trainer: what is missing at the end, as a share of its steps, is a share of its time.
        lost_seconds = (int(steps) - seen) / int(steps) * float(seconds)
        assert 0 <= lost_seconds <= 0.5 + 0.1, (steps, seen, seconds)


def test_a_trainer_that_is_killed_loses_at_most_half_a_second(tmp_path: Path) -> None:
    killed(tmp_path, [0.0, 0.7, 1.2])


@pytest.mark.slow
def test_a_trainer_that_is_killed_at_any_time_loses_at_most_half_a_second(tmp_path: Path) -> None:
    killed(tmp_path, [random.Random(4).uniform(0, 2) for _ in range(50)])


def test_a_killed_program_is_reported_as_having_said_no_goodbye(tmp_path: Path) -> None:
    code = "import os, signal; from training import steps; steps(2000); os.kill(os.getpid(), signal.SIGKILL)"
    ours = recorded("-c", code, cwd=tmp_path, env=environment(PYTHONPATH=str(SCRIPTS)))
    assert (ours.code, ours.stdout) == (-9, "")
    directory = run_directory(tmp_path)
    drawn = launch([sys.executable, "-m", "gradctl", "report", directory], tmp_path)
    assert drawn.code == 0
    assert "without saying goodbye" in drawn.stdout
    assert "without saying goodbye" in (directory / "report.html").read_text()


def test_a_full_disk_ends_the_recording_and_not_the_program(tmp_path: Path) -> None:
    ours = recorded(SCRIPTS / "full_disk.py", cwd=tmp_path)
    assert ours.code == 4
    assert ours.stdout.startswith("loss")
    assert ours.stderr.count("recording stops, the script goes on") == 1
    (lines,) = journals(run_directory(tmp_path)).values()
    assert lines[-1]["k"] == "end"
    assert lines[-1]["code"] == 4
    (cut,) = [entry for entry in lines[-1]["not_seen"] if "could not be written" in entry[1]]
    assert "File too large" in cut[1]
    assert "could not be written" in (run_directory(tmp_path) / "report.html").read_text()


@pytest.mark.parametrize("what", [pytest.param("move", marks=pytest.mark.slow), "remove"])
def test_a_program_may_move_away_remove_the_run_directory_and_leave_by_os_exit(tmp_path: Path, what: str) -> None:
    ours = recorded(SCRIPTS / "moved.py", what, cwd=tmp_path)
    assert ours.code == 9
    assert ours.stdout.count("loss") == 2
    if what == "remove":
        assert "is gone" in ours.stderr
        assert not (tmp_path / "gradctl-runs").exists()
    else:
        (lines,) = journals(run_directory(tmp_path)).values()
        assert (lines[-1]["how"], lines[-1]["code"], num_steps(lines)) == ("os._exit", 9, 2020)
        assert (run_directory(tmp_path) / "report.html").is_file()


def test_ctrl_c_during_the_report_ends_the_report_only(tmp_path: Path) -> None:
    code = "import os, signal, torch; print('done', flush=True); os.kill(os.getpid(), signal.SIGINT)"
    program = subprocess.Popen(
        [*GRADCTL, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(SCRIPTS)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    assert program.stdout is not None
    assert program.stdout.readline() == "done\n"
    while not (drawers := children.read_text().split()):
        time.sleep(0.005)
    drawer = int(drawers[0])
    while b"draw_at_exit" not in Path(f"/proc/{drawer}/cmdline").read_bytes():
        time.sleep(0.005)
    os.killpg(program.pid, signal.SIGINT)
    _, said = program.communicate(timeout=100)
    assert program.returncode == -signal.SIGINT  # that of the script itself
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1


def test_an_exception_is_told_with_the_line_of_the_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import torch\nx = torch.ones(3, requires_grad=True)\nprint('before')\nx.sum().backward()\n")
    ours = recorded("--grad", "off", "--no-report", script, cwd=tmp_path)
    assert (ours.code, ours.stdout) == (1, "before\n")
    assert ours.stderr.count("Traceback") == 1
    assert "BackwardRefused" in ours.stderr
    (lines,) = journals(run_directory(tmp_path)).values()
    assert (lines[0]["grad"], lines[-1]["code"]) == ("off", 1)
    exc = lines[-1]["exc"]
    assert (exc["file"], exc["line"]) == (str(script), 4)
    assert "refused" in exc["message"]
    assert not (run_directory(tmp_path) / "report.html").exists()


def launched(tmp_path: Path, *arguments: str, code: int) -> None:
    """Two ranks that nobody's launcher started; what launchers leave is two environments and one parent."""
    ranks = [
        subprocess.Popen(
            [*GRADCTL, *arguments, str(SCRIPTS / "rank.py"), str(code)],
            cwd=tmp_path,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, 0]
    assert [out for out, _ in said] == ["rank 0\n", "rank 1\n"]
    assert "2 ranks" in " ".join(said[0][1].split())
    assert said[1][1] == ""


def test_ranks_share_a_run_directory_and_the_first_waits_for_the_late_one(tmp_path: Path) -> None:
    launched(tmp_path, code=7)
    directory = run_directory(tmp_path)
    found = journals(directory)
    assert list(found) == ["journal.rank0.jsonl", "journal.rank1.jsonl"]
    assert [num_steps(lines) for lines in found.values()] == [10, 11]
    assert [lines[0]["rank"] for lines in found.values()] == [0, 1]
    assert [(lines[-1]["how"], lines[-1]["code"]) for lines in found.values()] == [("os._exit", 7), ("exit", 0)]
    # What the ranks agreed by has been taken away.
    assert sorted(os.listdir(directory)) == ["journal.rank0.jsonl", "journal.rank1.jsonl", "report.html"]
    assert os.listdir(tmp_path / "gradctl-runs") == [directory.name]


@pytest.mark.slow
def test_ranks_share_the_directory_that_they_are_told(tmp_path: Path) -> None:
    launched(tmp_path, "--out", "here", code=0)
    assert sorted(os.listdir(tmp_path / "here")) == ["journal.rank0.jsonl", "journal.rank1.jsonl", "report.html"]


TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
)


@pytest.mark.distributed
def test_torchrun_starts_ranks_through_gradctl_and_gets_the_code_of_the_one_that_fails(tmp_path: Path) -> None:
    # Ranks that import no torch start at once; those that train are in the slow test below.
    script = tmp_path / "rank.py"
    script.write_text("import os, sys\nsys.exit(7 if os.environ['RANK'] == '1' else 0)\n")
    ours = launch([*TORCHRUN, "-m", "gradctl", "run", "rank.py"], tmp_path)
    assert ours.code == 1
    assert "exitcode  : 7" in ours.stderr
    assert "rank      : 1" in ours.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_gets_the_exit_code_of_its_rank(tmp_path: Path) -> None:
    ours = launch([*TORCHRUN, "-m", "gradctl", "run", SCRIPTS / "rank.py", "7"], tmp_path)
    theirs = launch([*TORCHRUN, SCRIPTS / "rank.py", "7"], tmp_path)
    assert ours.code == theirs.code == 1
    assert "exitcode  : 7" in theirs.stderr
    assert "exitcode  : 7" in ours.stderr
    assert list(journals(run_directory(tmp_path))) == ["journal.rank0.jsonl", "journal.rank1.jsonl"]


def test_a_python_child_is_recorded_with_no_torch_in_its_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\nchild = 'from training import steps; steps(3)'\n"
        "print(subprocess.run([sys.executable, '-c', child]).returncode)\n"
    )
    ours = recorded("-q", "--no-report", "parent.py", cwd=tmp_path, env=environment(PYTHONPATH=str(SCRIPTS)))
    assert (ours.code, ours.stdout, ours.stderr) == (0, "0\n", "")
    (lines,) = journals(run_directory(tmp_path)).values()
    assert (lines[0]["start"], lines[0]["main"], num_steps(lines)) == ("child", False, 3)
    assert lines[-1]["code"] == 0


@pytest.mark.slow
def test_children_that_start_a_python_of_their_own_are_recorded(tmp_path: Path) -> None:
    theirs = plain(SCRIPTS / "spawned.py", cwd=tmp_path)
    ours = recorded(SCRIPTS / "spawned.py", cwd=tmp_path)
    assert (ours.code, ours.stdout) == (theirs.code, theirs.stdout)
    assert ours.code == 0, ours.stderr
    found = journals(run_directory(tmp_path))
    main = found.pop("journal.rank0.jsonl")
    assert num_steps(main) == 2
    assert sorted(num_steps(lines) for lines in found.values()) == [3, 4, 5]
    assert ["a Python child", "it was started with -I"] in main[-1]["not_seen"]
    assert "-I" in (run_directory(tmp_path) / "report.html").read_text()
    assert sorted(main[-1]["children"]) == sorted(lines[0]["pid"] for lines in found.values())
