"""The recorder on two ranks: nothing waits, nothing changes, and what ranks sample can be compared."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gradctl._journal import Journal, read

PROGRAM = Path(__file__).with_name("record_rank.py")


def run_ranks(kind: str, folder: Path) -> list[tuple[list[float], list[float]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), kind, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(ranks):
            try:
                output, _ = process.communicate(timeout=180)
            except subprocess.TimeoutExpired:
                pytest.fail(f"rank {rank} of {kind} is stuck")
            assert process.returncode == 0, f"rank {rank}: {output}"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return [tuple(json.loads((folder / f"{kind}.{rank}.json").read_text())) for rank in range(2)]


def journals(folder: Path) -> list[Journal]:
    return [read(folder / f"journal.rank{rank}.jsonl") for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_ranks_train_as_they_would_and_sample_the_same_steps(tmp_path: Path, kind: str) -> None:
    for plain, watched in run_ranks(kind, tmp_path):
        assert watched == plain
    one, other = journals(tmp_path)
    for journal in (one, other):
        assert journal.end is not None
        assert journal.end.faults == 0
        assert dict(journal.end.steps) == {0: 24}
        assert all(code is not None for row in journal.rows for code in row.g)
        assert journal.optimizers[0].names == ("0.weight", "0.bias", "2.weight", "2.bias")
        assert journal.optimizers[0].shapes[0] == (64, 20)
    steps, others = ({row.n for row in journal.rows} for journal in (one, other))
    assert len(steps & others) >= 0.3 * min(len(steps), len(others))
    if kind == "ddp":
        assert one.named("ddp")[0].data["world_size"] == 2
        assert [row.tot for row in one.rows[:5]] == [row.tot for row in other.rows[:5]]


def test_autograd_over_rpc_is_recorded_by_its_own_backward(tmp_path: Path) -> None:
    (_, losses), _ = run_ranks("rpc", tmp_path)
    journal = read(tmp_path / "journal.rank0.jsonl")
    record = journal.optimizers[0]
    assert (record.source, record.cls, record.shapes) == ("backward", "distributed autograd", ((3,),))
    assert journal.end is not None
    assert journal.end.faults == 0
    assert dict(journal.end.steps) == {0: 6}
    assert journal.blocks[0].loss is not None
    assert journal.blocks[0].loss[0] == pytest.approx(losses[0], rel=1e-3)
