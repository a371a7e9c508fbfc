"""The tail of a journal: what a kill leaves of the blocks that are still open."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradctl._journal import JournalWriter, read
from gradctl._journal._tail import SIZE
from gradctl._record import Recorder

NAME = "journal.rank0.jsonl"


def block(n: int, c: int, o: int = 0) -> dict[str, Any]:
    return {"o": o, "n": n, "c": c, "t": 1.0, "l": [1.0, 1.0, 1.0], "bad": 0, "mb": c, "ms": [1, 0, 0, 0]}


def write_one(path: Path, blocks: list[dict[str, Any]]) -> JournalWriter:
    writer = JournalWriter(path)
    writer.write("run", schema="gradctl.journal/1", pid=7)
    writer.write("b", now=True, **block(1, 10))
    writer.tail(lambda: blocks, now=0.0)
    return writer


def covered(path: Path) -> list[int]:
    return [n for found in read(path).blocks for n in range(found.n, found.n + found.c)]


def test_the_open_block_is_read_from_a_private_file_of_less_than_a_page(tmp_path: Path) -> None:
    path = tmp_path / NAME
    writer = write_one(path, [block(11, 5), block(1, 3, o=1)])
    tail = tmp_path / f"{NAME}.tail"
    assert (tail.stat().st_size, stat.S_IMODE(tail.stat().st_mode)) == (SIZE, 0o600)
    assert SIZE < 4096
    journal = read(path)
    assert [(found.o, found.n, found.c) for found in journal.blocks] == [(0, 1, 10), (0, 11, 5), (1, 1, 3)]
    assert (journal.bad_lines, journal.cut) == (0, False)
    copied = shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"))
    assert read(copied / NAME).blocks == journal.blocks
    writer.close()
    assert not tail.exists()
    assert covered(path) == list(range(1, 11))


def test_a_block_that_the_journal_has_by_now_is_not_added_again(tmp_path: Path) -> None:
    path = tmp_path / NAME
    writer = write_one(path, [block(11, 5)])
    writer.write("b", now=True, **block(11, 9))
    assert covered(path) == list(range(1, 20))
    writer.close()


def test_a_tail_is_written_four_times_a_second_at_most(tmp_path: Path) -> None:
    writer = write_one(tmp_path / NAME, [])
    asked: list[float] = []
    for tick in range(1, 101):
        writer.tail(lambda tick=tick: asked.append(tick / 100) or [], now=tick / 100)
    assert asked == [0.25, 0.5, 0.75, 1.0]
    writer.close()


def test_more_blocks_than_fit_leave_the_first_ones(tmp_path: Path) -> None:
    writer = write_one(tmp_path / NAME, [block(1, 2, o=o) for o in range(1, 300)])
    found = [entry.o for entry in read(tmp_path / NAME).blocks]
    assert 20 < len(found) < 60
    assert found == list(range(len(found)))
    assert (tmp_path / f"{NAME}.tail").stat().st_size == SIZE
    writer.close()


def sealed(body: bytes) -> bytes:
    return (b"%08x %s" % (zlib.crc32(body), body)).ljust(SIZE - 1) + b"\n"


def test_a_tail_that_is_torn_foreign_or_of_another_size_is_passed_over(tmp_path: Path) -> None:
    path, tail = tmp_path / NAME, tmp_path / f"{NAME}.tail"
    writer = write_one(path, [block(11, 5)])
    whole = tail.read_bytes()
    mark = json.loads(whole[9:])["of"]
    spoiled = [
        b"",
        whole[:100],
        whole[:2000],
        whole + b" ",
        whole * 3,
        whole.replace(b'"n":11', b'"n":12'),
        b"\x00" * SIZE,
        sealed(json.dumps({"of": mark + 1, "b": [block(11, 5)]}).encode()),
        sealed(json.dumps({"of": mark, "b": [{"o": 0}, 7, None, {"o": 0, "n": -1, "c": 5}]}).encode()),
        sealed(json.dumps({"of": mark, "b": 7}).encode()),
        sealed(b"[" * 3000),
    ]
    for data in spoiled:
        tail.write_bytes(data)
        assert covered(path) == list(range(1, 11)), data[:60]
    tail.unlink()
    os.mkfifo(tail)
    assert covered(path) == list(range(1, 11))
    tail.unlink()
    (tmp_path / "other").write_bytes(whole)
    tail.symlink_to("other")
    assert covered(path) == list(range(1, 11))
    tail.unlink()
    writer.close()


def test_a_tail_left_by_an_earlier_journal_of_that_name_is_cleared(tmp_path: Path) -> None:
    tail = tmp_path / f"{NAME}.tail"
    tail.write_bytes(b"old")
    writer = JournalWriter(tmp_path / NAME)
    writer.write("run", now=True, schema="gradctl.journal/1")
    assert not tail.exists()
    writer.close()


def test_a_place_that_refuses_a_tail_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / NAME
    writer = JournalWriter(path)
    writer.write("run", now=True, schema="gradctl.journal/1")
    (tmp_path / f"{NAME}.tail").mkdir()
    writer.tail(lambda: [block(1, 2)], now=0.0)
    writer.write("b", now=True, **block(1, 10))
    assert writer.failed is None
    assert covered(path) == list(range(1, 11))
    writer.close()


def test_a_forked_child_leaves_the_tail_to_its_parent(tmp_path: Path) -> None:
    path, tail = tmp_path / NAME, tmp_path / f"{NAME}.tail"
    writer = write_one(path, [block(11, 5)])
    pid = os.fork()
    if pid == 0:
        writer.forget(tmp_path / "journal.rank0.pid9.jsonl")
        writer.tail(lambda: [block(1, 1)], now=9.0)
        writer.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert sorted(found.name for found in tmp_path.iterdir()) == [path.name, tail.name]
    writer.close()


def test_an_hour_of_steps_loses_half_a_second_at_most_when_it_is_killed(tmp_path: Path) -> None:
    now = [0.0]
    path = tmp_path / NAME
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    recorder = Recorder(JournalWriter(path), budget=1e-6, clock=lambda: now[0])
    recorder.install()
    lost: list[int] = []
    without: list[int] = []
    steps = 18_000
    for number in range(1, steps + 1):
        weight.sum().backward()
        now[0] += 0.2
        optimizer.step()
        if number > steps - 40:
            seen = covered(path)
            assert seen == list(range(1, len(seen) + 1))
            lost.append(number - len(seen))
            closed = [json.loads(line) for line in path.read_text().splitlines() if '"k":"b"' in line]
            without.append(number - sum(found["c"] for found in closed))
    assert max(lost) <= 2
    assert max(without) > 15  # what the tail is for
    recorder.finish("exit", code=0)
    recorder.journal.close()
    assert covered(path) == list(range(1, steps + 1))
    assert [found.name for found in tmp_path.iterdir()] == [NAME]


TRAINS_FOR_EVER = """
import os, sys, time, torch
from gradctl._journal import JournalWriter
from gradctl._record import Recorder, _budget
_budget.MIN_BLOCK_SECONDS = 1e9  # no block is ever full, as in a run of days
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.0)
Recorder(JournalWriter(sys.argv[1])).install()
while True:
    weight.sum().backward()
    optimizer.step()
    os.write(1, b"%.6f\\n" % time.time())
    time.sleep(0.002)
"""


def test_a_killed_program_loses_half_a_second_at_most_of_an_open_block(tmp_path: Path) -> None:
    path, out = tmp_path / NAME, tmp_path / "out"
    with out.open("wb") as file:
        child = subprocess.Popen([sys.executable, "-c", TRAINS_FOR_EVER, str(path)], stdout=file)
        deadline = time.monotonic() + 60
        while out.stat().st_size < 18 * 300 and time.monotonic() < deadline:
            time.sleep(0.02)
        child.kill()
        child.wait()
    ends = [float(line) for line in out.read_text().splitlines()]
    seen = covered(path)
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) > 100
    assert ends[-1] - ends[len(seen) - 1] < 0.5


@pytest.mark.parametrize("steps", [3, 40])
def test_a_recording_that_ends_leaves_no_tail(tmp_path: Path, steps: int) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    recorder = Recorder(JournalWriter(tmp_path / NAME))
    recorder.install()
    for _ in range(steps):
        weight.sum().backward()
        optimizer.step()
    assert (tmp_path / f"{NAME}.tail").exists()
    recorder.finish("exit", code=0)
    recorder.journal.close()
    assert [found.name for found in tmp_path.iterdir()] == [NAME]
