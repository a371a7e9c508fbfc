from __future__ import annotations

import base64
import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import journals
from gradctl._errors import BadJournal, GradctlError, RunDirectoryError, UsageError
from gradctl._journal import EVENTS_KEPT, Journal, JournalWriter, Run, current, emit, encode_norms, read, set_current
from gradctl._journal import decode_norms as decode
from gradctl._journal._writer import PAGE, _by_page

NAME = "journal.rank0.jsonl"


def parsed(path: Path) -> list[dict]:
    """Every line of a file, by the standard library: a torn line fails here."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_python(code: str, *arguments: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, timeout=60, **more
    )


# --- norms -----------------------------------------------------------------------------------------------------------


@given(st.floats(min_value=1e-280, max_value=1e280))
def test_a_norm_comes_back_within_its_resolution(norm: float) -> None:
    (back,) = decode(encode_norms([norm]))
    assert back == pytest.approx(norm, rel=0.0117)


@given(st.floats(min_value=1e-7, max_value=1e3))
def test_a_packed_norm_comes_back_within_its_resolution(norm: float) -> None:
    back = decode(encode_norms([norm] * 501))
    assert len(back) == 501
    assert back[0] == pytest.approx(norm, rel=0.06)


@pytest.mark.parametrize("count", [1, 501])
def test_none_zero_and_non_finite_are_three_different_things(count: int) -> None:
    values = [None, 0.0, math.nan, math.inf, -math.inf] * count
    back = decode(encode_norms(values))
    assert back[:2] == (None, 0.0)
    assert all(math.isnan(v) for v in back[2:5])


@pytest.mark.parametrize("count", [1, 501])
def test_the_smallest_norm_is_not_taken_for_zero(count: int) -> None:
    for tiny in (1.02e-10, 1e-10, 1.024e-10, 5e-324):
        back = decode(encode_norms([tiny] * count))[0]
        assert back is not None
        assert back > 0


def test_packed_norms_take_one_byte_each() -> None:
    coded = encode_norms([1.0] * 3000)
    assert isinstance(coded, str)
    assert len(base64.b64decode(coded)) == 3000


# --- writer ----------------------------------------------------------------------------------------------------------


def test_nothing_is_created_before_the_first_record_is_flushed(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []
    writer.write("run", now=True, schema="gradctl.journal/1")
    assert parsed(tmp_path / NAME) == [{"k": "run", "schema": "gradctl.journal/1"}]
    writer.close()


def test_the_file_is_readable_by_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        writer = JournalWriter(tmp_path / NAME)
        writer.write("x", now=True)
        writer.close()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600


def test_a_file_that_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("mine")
    told: list[str] = []
    writer = JournalWriter(tmp_path / NAME, on_failure=told.append)
    writer.write("x", now=True)
    writer.write("x", now=True)
    assert (tmp_path / NAME).read_text() == "mine"
    assert told == [writer.failed] == ["File exists"]


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    writer = JournalWriter(tmp_path / NAME)
    writer.write("x", now=True)
    assert writer.failed
    assert not (tmp_path / "elsewhere").exists()


def test_records_wait_for_half_a_second_at_most_and_for_64_kib(tmp_path: Path) -> None:
    now = [0.0]
    writer = JournalWriter(tmp_path / NAME, clock=lambda: now[0])
    writer.write("first")
    assert not (tmp_path / NAME).exists()
    now[0] = 0.51
    writer.write("second")
    assert len(parsed(tmp_path / NAME)) == 2
    writer.write("big", text="x" * 70_000)
    assert len(parsed(tmp_path / NAME)) == 3
    writer.close()


def test_each_event_name_keeps_its_first_and_counts_the_rest(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / NAME)
    for step in range(EVENTS_KEPT + 7):
        writer.event("skip", n=step)
    writer.event("none", params=[])
    assert len(parsed(tmp_path / NAME)) == EVENTS_KEPT + 1
    assert writer.dropped == {"skip": 7}
    writer.close()


def test_an_event_is_emitted_to_the_journal_of_the_process_and_to_none_without_one(tmp_path: Path) -> None:
    emit("off", state="on")
    writer = JournalWriter(tmp_path / NAME)
    set_current(writer)
    try:
        assert current() is writer
        emit("off", site="a.py:1", state="on")
    finally:
        set_current(None)
        writer.close()
    (record,) = parsed(tmp_path / NAME)
    assert (record["k"], record["e"], record["site"], record["state"]) == ("event", "off", "a.py:1", "on")


@pytest.mark.parametrize("threads", [4])
def test_lines_of_several_threads_are_whole(tmp_path: Path, threads: int) -> None:
    writer = JournalWriter(tmp_path / NAME, flush_bytes=1000)

    def many(who: int) -> None:
        for step in range(300):
            writer.write("b", o=who, n=step, text="y" * 50)

    workers = [threading.Thread(target=many, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    writer.close()
    lines = parsed(tmp_path / NAME)
    assert len(lines) == threads * 300
    assert [line["n"] for line in lines if line["o"] == 2] == list(range(300))


def test_a_disk_that_fills_up_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    # a limit on the file's size is the full disk that a test can have anywhere
    code = """
import resource, signal, sys
from gradctl._journal import JournalWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
told = []
writer = JournalWriter(sys.argv[1], on_failure=told.append)
for step in range(1000):
    writer.write("b", now=True, o=0, n=step + 1, c=1, text="z" * 40)
writer.close()
print(len(told), bool(writer.failed), writer.bytes)
"""
    done = run_python(code, str(tmp_path / NAME))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["1", "True", "10000"]
    journal = read(tmp_path / NAME)
    assert (journal.bad_lines, journal.cut) == (0, True)


def test_a_device_without_room_is_told_once() -> None:
    told: list[str] = []
    writer = JournalWriter("/dev/full", on_failure=told.append)
    # the file is opened by us here because the writer never opens what exists
    writer._descriptor = os.open("/dev/full", os.O_WRONLY)
    writer.write("b", now=True)
    writer.write("b", now=True)
    assert told == [os.strerror(28)]


def test_a_missing_folder_is_told_and_stops_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    writer = JournalWriter(tmp_path / "gone" / NAME, on_failure=told.append)
    writer.write("b", now=True)
    writer.close()
    assert told == ["No such file or directory"]


def test_a_forked_child_writes_no_line_of_its_parent(tmp_path: Path) -> None:
    code = """
import os, sys
from gradctl._journal import JournalWriter
writer = JournalWriter(sys.argv[1] + "/journal.rank0.jsonl", flush_seconds=1e9)
writer.write("run", schema="gradctl.journal/1", now=True)
writer.write("b", who="parent, not yet written")
if os.fork() == 0:
    writer.forget(sys.argv[1] + "/journal.rank0.pid7.jsonl")
    writer.write("b", who="child")
    writer.close()
    os._exit(0)
os.wait()
writer.write("b", who="parent, later")
writer.close()
"""
    done = run_python(code, str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    mine = [line.get("who") for line in parsed(tmp_path / NAME)]
    assert mine == [None, "parent, not yet written", "parent, later"]
    assert [line.get("who") for line in parsed(tmp_path / "journal.rank0.pid7.jsonl")] == ["child"]


@given(lengths=st.lists(st.integers(2, 9000), max_size=30), offset=st.integers(0, 10_000))
def test_a_line_of_up_to_a_page_is_written_whole_inside_one_page(lengths: list[int], offset: int) -> None:
    lines = [b"x" * (length - 1) + b"\n" for length in lengths]
    position, written = offset, b""
    for data in _by_page(lines, offset):
        longest = max((len(line) for line in data.split()), default=0) + 1
        assert longest > PAGE or not data or position // PAGE == (position + len(data) - 1) // PAGE
        position += len(data)
        written += data
    assert written.split() == [line[:-1] for line in lines]
    assert all(line.strip() for line in written.splitlines())


WRITES_FOR_EVER = """
import sys, time
from gradctl._journal import JournalWriter
writer = JournalWriter(sys.argv[1])
writer.write("run", schema="gradctl.journal/1", now=True)
step = 0
while True:
    step += 1
    writer.write("b", o=0, n=step, c=1, l=[1.0, 1.0, 1.0], ms=[1, 0, 0, 0], at=time.time(), pad="p" * (step % 700))
"""


def kill_while_writing(directory: Path, pause: float) -> None:
    path = directory / NAME
    child = subprocess.Popen([sys.executable, "-c", WRITES_FOR_EVER, str(path)])
    while not path.exists():
        time.sleep(0.005)
    time.sleep(pause)
    killed_at = time.time()
    child.kill()
    child.wait()
    lines = parsed(path)
    steps = [line["n"] for line in lines[1:]]
    assert steps == list(range(1, len(steps) + 1))
    assert not steps or killed_at - lines[-1]["at"] < 0.6
    journal = read(path)
    assert (journal.bad_lines, journal.cut, journal.end) == (0, False, None)
    assert len(journal.blocks) == len(steps)


def test_a_kill_tears_no_line_and_loses_half_a_second_at_most(tmp_path: Path) -> None:
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        kill_while_writing(directory, 0.03 + 0.037 * attempt)


@pytest.mark.slow
def test_fifty_kills_tear_no_line(tmp_path: Path) -> None:
    for attempt in range(50):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        kill_while_writing(directory, 0.01 + (attempt * 0.6180339887) % 1 * 0.7)


# --- round trip ------------------------------------------------------------------------------------------------------

NAMES = st.text(max_size=30)
WHOLE = st.integers(min_value=0, max_value=2**40)
REAL = st.floats(allow_nan=False, allow_infinity=False)
NORMS = st.lists(st.none() | st.just(0.0) | st.floats(min_value=1e-9, max_value=1e9), min_size=1, max_size=6)


@given(names=st.lists(st.none() | NAMES, max_size=5), rate=st.lists(REAL, max_size=3), numel=WHOLE, cls=NAMES)
def test_an_optimizer_comes_back_as_it_was_written(names, rate, numel, cls) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = JournalWriter(Path(folder) / NAME)
        shapes = [[k, 2] for k in range(len(names))]
        more = {"dtypes": ["torch.float32"] * len(names), "groups": 0, "thread": "T", "roots": [["Net", 2]]}
        writer.write(
            "opt", o=3, cls=cls, names=names, shapes=shapes, lr=rate, numel=numel, frozen=1, named="scan", **more
        )
        writer.close()
        record = read(Path(folder) / NAME).optimizers[3]
    assert record.names == tuple(names)
    assert record.shapes == tuple(tuple(shape) for shape in shapes)
    assert (record.cls, record.numel, record.frozen, record.lr) == (cls, numel, 1, tuple(rate))
    assert (record.named, record.roots, record.source) == ("scan", (("Net", 2),), "optimizer")


@given(
    step=st.integers(min_value=1, max_value=2**40),
    count=st.integers(min_value=1, max_value=10**6),
    loss=st.none() | st.tuples(REAL, REAL, REAL),
    clip=st.none() | st.tuples(WHOLE, WHOLE, REAL, REAL, REAL, REAL),
    norm=st.none() | st.tuples(REAL, REAL),
    times=st.tuples(REAL, REAL, REAL, REAL),
)
def test_a_block_comes_back_as_it_was_written(step, count, loss, clip, norm, times) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = JournalWriter(Path(folder) / NAME)
        more = {key: value for key, value in (("clip", clip), ("tot", norm)) if value is not None}
        writer.write("b", o=1, n=step, c=count, t=2.5, l=loss, bad=4, mb=9, ms=times, **more)
        writer.close()
        (block,) = read(Path(folder) / NAME).blocks
    assert (block.o, block.n, block.c, block.last, block.t) == (1, step, count, step + count - 1, 2.5)
    assert (block.loss, block.norm, block.bad, block.microbatches) == (loss, norm, 4, 9)
    assert (block.step_ms, block.backward_ms, block.optimizer_ms, block.data_ms) == times
    assert (block.clip is None) == (clip is None)
    if block.clip and clip:
        seen = block.clip
        assert (seen.calls, seen.clipped, seen.worst_ratio, seen.limit, seen.mean_norm, seen.max_norm) == clip


@given(norms=NORMS, ratios=NORMS, cos=st.none() | REAL, step=st.integers(min_value=1, max_value=10**9))
def test_a_row_comes_back_as_it_was_written(norms, ratios, cos, step) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = JournalWriter(Path(folder) / NAME)
        more = {} if cos is None else {"cos": cos}
        writer.write("row", o=0, n=step, t=1.0, g=encode_norms(norms), u=encode_norms(ratios), tot=1.5, none=1, zero=2,
                     dead=0.25, lr=[0.1, 0.2], rss=77, **more)  # fmt: skip
        writer.close()
        (row,) = read(Path(folder) / NAME).rows
    for back, told in ((row.g, norms), (row.u, ratios)):
        assert [v is None for v in back] == [v is None for v in told]
        assert [v for v in back if v is not None] == pytest.approx([v for v in told if v is not None], rel=0.0117)
    assert (row.n, row.cos, row.tot, row.none, row.zero, row.dead) == (step, cos, 1.5, 1, 2, 0.25)
    assert (row.lr, row.rss, row.cuda) == ((0.1, 0.2), 77.0, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=6))
def test_an_event_comes_back_with_everything_it_carried(data: dict) -> None:
    data = {key: value for key, value in data.items() if key not in ("k", "e", "t", "o", "n")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        path.write_text(json.dumps({"k": "event", "e": "x", "t": 1, **data}) + "\n", encoding="utf-8")
        (event,) = read(path).events
    assert repr(dict(event.data)) == repr(json.loads(json.dumps(data)))


# --- reader: what it is given in good faith --------------------------------------------------------------------------


def test_every_kind_of_record_is_read(tmp_path: Path) -> None:
    run = Run.load(journals.healthy(tmp_path))
    (journal,) = run.journals
    assert run.ranks == (journal,)
    assert (journal.rank, journal.pid, journal.is_child, journal.cut, journal.bad_lines) == (0, 4242, False, False, 0)
    assert journal.run is not None
    assert journal.run.argv == ("train.py", "--steps", "400")
    assert journal.optimizers[0].name(0) == "transformer.wte.weight"
    assert journal.end is not None
    assert journal.end.steps == {0: 400}
    assert journal.blocks[-1].last == 400
    assert journal.rows[0].g[0] == pytest.approx(journals.plain_norms(journals.gpt()[1])(1)[0], rel=0.012)
    assert journal.saved[0].rows[0].bytes == 64 << 20
    assert journal.maxima


def test_journals_are_sorted_by_rank_and_children_come_last(tmp_path: Path) -> None:
    for name in (
        "journal.rank10.jsonl",
        "journal.rank2.jsonl",
        "journal.rank0.pid9.jsonl",
        "journal.rank0.pid10.jsonl",
    ):
        journals.write(tmp_path, run=journals.header(), name=name)
    run = Run.load(tmp_path)
    assert [j.rank for j in run.ranks] == [2, 10]
    assert [j.pid for j in run.children] == [9, 10]


def test_a_later_optimizer_record_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    lines = [{"k": "opt", "o": 0, "names": [None]}, {"k": "opt", "o": 0, "names": ["late.weight"]}]
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(tmp_path / NAME).optimizers[0].names == ("late.weight",)


def test_unknown_kinds_and_fields_are_passed_over_in_silence(tmp_path: Path) -> None:
    lines = [journals.header(colour="red"), {"k": "hologram", "x": [1]}, {"k": "b", "o": 0, "n": 1, "c": 1, "new": {}}]
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = read(tmp_path / NAME)
    assert (journal.bad_lines, len(journal.blocks), journal.newer) == (0, 1, False)


def test_a_newer_version_is_read_as_far_as_it_is_understood_and_marked(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=20)
    path = directory / NAME
    path.write_text(path.read_text().replace("gradctl.journal/1", "gradctl.journal/2"))
    journal = read(path)
    assert journal.newer
    assert journal.blocks[-1].last == 20


# --- reader: what it is given in bad faith ---------------------------------------------------------------------------


def test_a_missing_directory_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="nowhere is not a run directory") as caught:
        Run.load(tmp_path / "nowhere")
    assert "it does not exist" in str(caught.value)


def test_a_file_is_not_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(RunDirectoryError, match="it is a file"):
        Run.load(tmp_path / "x")


def test_a_directory_without_a_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    (tmp_path / "journal.rank0.jsonl.bak").touch()
    with pytest.raises(RunDirectoryError, match="holds no journal"):
        Run.load(tmp_path)


def test_a_directory_and_a_pipe_that_bear_a_journals_name_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "journal.rank0.jsonl").mkdir()
    os.mkfifo(tmp_path / "journal.rank1.jsonl")
    with pytest.raises(RunDirectoryError, match="holds no journal"):
        Run.load(tmp_path)


def test_an_empty_journal_is_an_empty_run(tmp_path: Path) -> None:
    (journal,) = Run.load(journals.empty(tmp_path)).journals
    assert (journal.run, journal.end, journal.cut, journal.bad_lines) == (None, None, False, 0)


def test_a_last_line_that_was_cut_is_not_counted_as_bad(tmp_path: Path) -> None:
    journal = read(journals.killed(tmp_path) / NAME)
    assert (journal.cut, journal.bad_lines, journal.end) == (True, 0, None)
    assert journal.blocks[-1].last == 1012


@pytest.mark.parametrize("at", range(0, 400, 37))
def test_a_journal_cut_anywhere_reads_what_stood_before(tmp_path: Path, at: int) -> None:
    whole = (journals.healthy(tmp_path, steps=30) / NAME).read_bytes()
    place = len(whole) * at // 400
    (tmp_path / NAME).write_bytes(whole[:place])
    journal = read(tmp_path / NAME)
    assert journal.bad_lines == 0
    assert journal.cut == (place > 0 and whole[place - 1 : place] != b"\n")


GARBAGE = [
    b"garbage", b"\xff\xfe\x00", b"[]", b"3", b"null", b'"text"', b"{}", b'{"k":3}', b'{"k":[]}',
    b'{"k":"b"}', b'{"k":"b","o":0,"n":0,"c":1}', b'{"k":"b","o":0,"n":-4,"c":1}',
    b'{"k":"b","o":0,"n":1,"c":0}',
    b'{"k":"b","o":"0","n":1,"c":1}', b'{"k":"b","o":0,"n":1.5,"c":1}', b'{"k":"b","o":0,"n":true,"c":1}',
    b'{"k":"b","o":0,"n":1,"c":1,"l":[1]}', b'{"k":"b","o":0,"n":1,"c":1,"l":"abc"}',
    b'{"k":"b","o":0,"n":1,"c":1,"ms":[1]}',
    b'{"k":"b","o":0,"n":1,"c":1,"clip":[1,2]}', b'{"k":"b","o":0,"n":' + b"9" * 30 + b',"c":1}',
    b'{"k":"b","o":0,"n":' + b"9" * 6000 + b',"c":1}', b'{"k":"row","o":0,"n":1,"g":"!!!"}',
    b'{"k":"row","o":0,"n":1,"g":7}',
    b'{"k":"row","o":0,"n":1}', b'{"k":"mx","o":0,"n":1,"g":null}', b'{"k":"event"}',
    b'{"k":"event","e":"x","t":"y"}',
    b'{"k":"saved","total":"x"}', b'{"k":"end","steps":[1]}', b'{"k":"end","code":"x"}',
    b'{"k":"opt","o":0,"names":7}',
    b'{"k":"opt","o":0,"shapes":[1]}', b'{"k":"run"}', b'{"k":"run","schema":"other/1"}',
    b'{"k":"run","schema":7}',
    b"[" * 100_000, b'{"k":' * 5000,
]  # fmt: skip


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: line[:40].decode("latin-1"))
def test_a_line_of_garbage_is_counted_and_stops_nothing(tmp_path: Path, line: bytes) -> None:
    good = (journals.healthy(tmp_path, steps=5) / NAME).read_bytes()
    clean = read(tmp_path / "healthy" / NAME)
    first, rest = good.split(b"\n", 1)
    (tmp_path / NAME).write_bytes(first + b"\n" + line + b"\n" + rest)
    journal = read(tmp_path / NAME)
    assert journal.bad_lines == 1
    assert (journal.run, journal.blocks, journal.rows, journal.end) == (clean.run, clean.blocks, clean.rows, clean.end)


def test_a_file_that_holds_no_record_is_not_a_journal(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(bytes(range(256)) * 40)
    with pytest.raises(BadJournal, match="is not a journal") as caught:
        read(tmp_path / NAME)
    assert isinstance(caught.value, UsageError)
    assert isinstance(caught.value, GradctlError)


def test_one_bad_journal_does_not_hide_the_other_ranks(tmp_path: Path) -> None:
    directory = journals.two_ranks(tmp_path, steps=20)
    (directory / "journal.rank1.jsonl").write_bytes(b"\x00garbage\n")
    run = Run.load(directory)
    assert [(j.rank, j.bad_lines > 0, len(j.blocks)) for j in run.ranks] == [(0, False, 20), (1, True, 0)]


def test_nan_and_infinity_are_read_as_such(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(
        '{"k":"b","o":0,"n":1,"c":1,"l":[NaN,-Infinity,Infinity],"ms":["nan",0,0,0]}\n'
        '{"k":"row","o":0,"n":1,"g":[NaN,Infinity,-Infinity,1e999,"nan","weird",true,null,-999]}\n'
    )
    journal = read(tmp_path / NAME)
    assert journal.bad_lines == 0
    assert journal.blocks[0].loss is not None
    assert math.isnan(journal.blocks[0].loss[0])
    assert math.isnan(journal.blocks[0].step_ms)
    norms = journal.rows[0].g
    assert math.isnan(norms[0] or 0)
    assert norms[-2:] == (None, 0.0)
    assert all(isinstance(v, float) for v in norms[:-2])


def test_records_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=40)
    lines = (directory / NAME).read_text().splitlines()
    (tmp_path / NAME).write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    plain, turned = read(directory / NAME), read(tmp_path / NAME)
    assert (turned.blocks, turned.rows, turned.maxima) == (plain.blocks, plain.rows, plain.maxima)


def test_nothing_in_a_journal_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    attack = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    lines = [
        journals.header(argv=[attack, f"$(touch {trap})"]),
        {"k": "event", "e": attack, "__reduce__": ["os.system", [f"touch {trap}"]]},
        {"k": "opt", "o": 0, "names": [attack], "__class__": attack},
        {"k": "saved", "n": 1, "total": 1, "rows": [[attack, attack, 1, 1]]},
    ]
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert isinstance(read(tmp_path / NAME), Journal)
    assert not trap.exists()


def test_a_line_of_many_megabytes_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    good = (journals.healthy(tmp_path, steps=10) / NAME).read_bytes()
    first, rest = good.split(b"\n", 1)
    with open(tmp_path / NAME, "wb") as file:
        file.write(first + b'\n{"k":"event","e":"')
        file.truncate(file.tell() + (256 << 20))  # a hole: no disk is used
        file.seek(0, os.SEEK_END)
        file.write(b'"}\n' + rest)
    code = """
import resource, sys
from gradctl._journal import read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
journal = read(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(journal.bad_lines, len(journal.blocks), journal.end is not None, (after - before) >> 10)
"""
    done = run_python(code, str(tmp_path / NAME))
    assert done.returncode == 0, done.stderr
    bad, blocks, ended, grown = done.stdout.split()
    assert (bad, blocks, ended) == ("1", "10", "True")
    assert int(grown) < 64  # MiB


def test_a_last_line_without_end_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    path = journals.healthy(tmp_path, steps=10) / NAME
    with open(path, "ab") as file:
        file.truncate(path.stat().st_size + (64 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    journal = read(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert len(journal.blocks) == 10
    assert journal.bad_lines + journal.cut == 1
    assert grown < 48


def test_a_journal_that_may_not_be_read_says_so() -> None:
    code = """
import os, sys
from gradctl._journal import Run
from gradctl._errors import UsageError
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for folder in sys.argv[1:]:
    try:
        Run.load(folder)
    except UsageError as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for kind in ("file", "folder"):
            (folder / kind).mkdir()
            journals.write(folder / kind, run=journals.header())
            (folder / kind).chmod(0o755)
        (folder / "file" / NAME).chmod(0o000)
        (folder / "folder").chmod(0o000)
        done = run_python(code, str(folder / "file"), str(folder / "folder"), cwd="/")
        (folder / "folder").chmod(0o755)
    first, second = done.stdout.splitlines()
    assert first.startswith("BadJournal")
    assert second.startswith("RunDirectoryError")
    assert "Permission denied" in first
    assert "Permission denied" in second


def test_the_reader_and_the_writer_import_no_torch() -> None:
    done = run_python("import sys; import gradctl._journal; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.split() == ["False", "False"]


def test_an_interrupt_in_a_write_is_the_programs_own(tmp_path: Path) -> None:
    # a signal handler that raises inside a record must not leave the writer locked for the next one
    writer = JournalWriter(tmp_path / NAME)

    def raise_it(*_: object) -> None:
        raise InterruptedError("stop")

    class Slow:
        def __str__(self) -> str:
            signal.raise_signal(signal.SIGUSR1)
            return "never"

    old = signal.signal(signal.SIGUSR1, raise_it)
    try:
        with pytest.raises(InterruptedError):
            writer.write("b", value=Slow())
    finally:
        signal.signal(signal.SIGUSR1, old)
    writer.write("b", n=2, now=True)
    writer.close()
    assert [line["n"] for line in parsed(tmp_path / NAME)] == [2]
