"""What a run finds out about itself: secrets to leave out, its rank, its directory, how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import gradctl
from gradctl._policy import Policy
from gradctl._run import _directory, _exit_status, _launcher, _unseen
from gradctl._run._injection import SITE, inject, withdraw
from gradctl._run._redact import redact

HIDDEN = "[redacted]"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--api-key", "X"], ["--api-key", HIDDEN]),
        (["--api_key=X", "--epochs", "3"], [f"--api_key={HIDDEN}", "--epochs", "3"]),
        (["--apikey", "X"], ["--apikey", HIDDEN]),
        (["token=X"], [f"token={HIDDEN}"]),
        (["--hf-token", "X"], ["--hf-token", HIDDEN]),
        (["WANDB_API_KEY=X"], [f"WANDB_API_KEY={HIDDEN}"]),
        (["--openai-key", "X"], ["--openai-key", HIDDEN]),
        (["--password", "X", "--db.password=Y"], ["--password", HIDDEN, f"--db.password={HIDDEN}"]),
        (["--login", "hf_abcdefghijkl"], ["--login", HIDDEN]),
        (["--x=sk-abcdef1234567890"], [f"--x={HIDDEN}"]),
        (["s3://user:pass@host/x"], [f"s3://user:{HIDDEN}@host/x"]),
        (["-c", "login(token='X'); train()"], ["-c", f"login(token='{HIDDEN}'); train()"]),
        (["--token", "--verbose"], ["--token", "--verbose"]),
    ],
)
def test_secrets_are_left_out_of_a_command_line(given: list[str], kept: list[str]) -> None:
    assert redact(given) == kept


@pytest.mark.parametrize(
    "argument",
    [
        *("--tokenizer=bert", "--num-tokens=512", "--max-new-tokens=5", "--pad-token=<pad>", "--eos_token=</s>"),
        *("--sort-key=loss", "--monitor_key=acc", "--author=me", "--passes=3", "--keys=a,b", "data.csv", "--lr=1e-3"),
        *("optimizer.lr=0.1", "https://host:8080/x", "monkey", "--pwd-free=1"),
    ],
)
def test_what_is_no_secret_is_kept(argument: str) -> None:
    assert redact([argument, "next"]) == [argument, "next"]


def test_ranks_are_read_from_what_launchers_leave() -> None:
    assert _launcher.find({}) == _launcher.Rank()
    assert _launcher.find({"RANK": "nonsense", "WORLD_SIZE": "2"}) == _launcher.Rank()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert _launcher.find(alone) == _launcher.Rank(restart=2)
    torchrun = _launcher.find(
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    )
    assert (torchrun.rank, torchrun.world_size, torchrun.node, torchrun.draws) == (5, 8, 1, False)
    mpi = _launcher.find({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    assert (mpi.rank, mpi.world_size, mpi.node, mpi.draws) == (1, 2, 0, False)
    slurm = _launcher.find(
        {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    )
    assert (slurm.rank, slurm.node, slurm.draws) == (2, 1, True)


def made_at_once(ranks: list[_launcher.Rank]) -> list[Path]:
    """The directories that the ranks get when all ask at the same time."""
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda own=rank: found.append(_directory.make(Policy(), "train.py", own)))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_of_one_launch_agree_on_a_directory_and_the_next_launch_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ranks = [_launcher.Rank(rank=rank, world_size=6, launch="same", draws=rank == 0) for rank in range(6)]
    for _ in range(2):
        found = made_at_once(ranks)
        assert len(set(found)) == 1
        assert set(_directory.started_ranks(found[0])) == set(range(6))
    assert len([path for path in (tmp_path / "gradctl-runs").iterdir() if path.is_dir()]) == 2
    elsewhere = _directory.make(Policy(), "train.py", replace(ranks[0], launch="other"))
    assert elsewhere != found[0]
    for path in (*(tmp_path / "gradctl-runs").glob("train-*"),):
        _directory.tidy(path)
    assert not (tmp_path / "gradctl-runs").exists()


def test_a_named_directory_serves_all_ranks_and_a_restart_gets_its_own(tmp_path: Path) -> None:
    policy = Policy(out=tmp_path / "out")
    ranks = [_launcher.Rank(rank=rank, world_size=2, launch="same", draws=rank == 0) for rank in (0, 1)]
    assert {_directory.make(policy, "train.py", rank) for rank in ranks} == {tmp_path / "out"}
    (tmp_path / "out" / "journal.rank0.jsonl").write_text("{}\n")
    with pytest.raises(gradctl.RunDirectoryError, match="rank 0 of this launch has started"):
        _directory.make(policy, "train.py", ranks[0])
    with pytest.raises(gradctl.RunDirectoryError, match="in use"):
        _directory.make(policy, "train.py", replace(ranks[0], launch="other"))
    again = _directory.make(policy, "train.py", replace(ranks[0], restart=1))
    assert again == tmp_path / "out-restart1"
    far = _directory.make(policy, "train.py", replace(ranks[1], node=1, launch="far"))
    assert far == tmp_path / "out-node1"
    forced = replace(policy, force=True)
    assert _directory.make(forced, "train.py", replace(ranks[0], launch="other")) == tmp_path / "out"
    assert not (tmp_path / "out" / "journal.rank0.jsonl").exists()


def test_an_environment_is_given_back_as_it_was() -> None:
    for before in ({}, {"PYTHONPATH": "a:b"}, {"PYTHONPATH": "a:"}):
        after = dict(before)
        inject(after, {"out": "x"})
        inject(after, {"out": "x"})
        assert after["PYTHONPATH"].split(os.pathsep).count(SITE) == 1
        withdraw(after)
        assert after == before


@pytest.mark.parametrize(
    ("status", "code"),
    [((None,), 0), ((0,), 0), ((3,), 3), ((-1,), 255), ((True,), 1), (("bad luck",), 1), (((1, 2),), 1)],
)
def test_the_exit_code_of_a_status_is_that_of_the_interpreter(status: tuple[object], code: int) -> None:
    source = f"import sys; sys.exit({status[0]!r})"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True).returncode == code
    assert _exit_status.code(status) == code


def test_an_exception_is_told_by_the_innermost_line_of_the_program() -> None:
    try:
        subprocess.run(["true"], cwd="/no/such/folder")
    except FileNotFoundError as error:
        told = _exit_status.describe(error)
    assert (told["type"], told["file"]) == ("FileNotFoundError", __file__)
    assert told["line"] == test_an_exception_is_told_by_the_innermost_line_of_the_program.__code__.co_firstlineno + 2


class Unreadable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def test_an_exception_that_cannot_be_read_is_told_by_its_type() -> None:
    told = _exit_status.describe(Unreadable())
    assert told["type"].endswith("Unreadable")
    assert "ValueError" in told["message"]


@pytest.mark.parametrize(
    ("command", "environment", "why"),
    [
        (["python", "-I", "x.py"], None, "-I"),
        (["/usr/bin/python3.12", "-uS", "-c", "pass"], None, "-S"),
        ("python3 -E x.py", None, "-E"),
        (["docker", "run", "image"], None, "in a container"),
        (["ssh", "host", "python"], None, "another host"),
        ([sys.executable, "x.py"], {"PATH": "/bin"}, "without the GRADCTL_RUN"),
    ],
)
def test_a_child_that_cannot_be_followed_is_known_by_its_command(
    command: list[str] | str, environment: dict[str, str] | None, why: str
) -> None:
    found = _unseen.reason(command, environment)
    assert found is not None
    assert why in found[1]


def test_a_child_that_will_be_followed_is_not_accused() -> None:
    told: dict[str, str] = {}
    inject(told, {})
    for command in (["python", "-c", "-I"], ["python", "-W", "ignore", "x.py", "-E"], "python x.py -S", Path("python")):
        assert _unseen.reason(command, told) is None
    assert _unseen.reason(["ls", "-I"], {}) is None
    assert _unseen.reason([], None) is None
