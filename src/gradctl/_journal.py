"""The journal of a run: typed records, append-only JSON lines, one file a process. No torch.

`docs/journal.md` documents every field. A line is written with one `write` to a file opened for appending, so that a
process killed at any moment leaves whole lines only; the reader skips what it cannot read and says how much that was.
Nothing that is read is ever executed.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradctl._errors import BadJournal, RunDirectoryError

SCHEMA = "gradctl.journal/1"
PACK_ABOVE = 500
"""Beyond this many tensors, norms are written as one byte each."""
EVENTS_KEPT = 200
LINE_LIMIT = 8 << 20
"""A longer line is skipped by the reader, without being held in memory."""
FILE_NAME = re.compile(r"journal\.rank(\d{1,6})(?:\.pid(\d{1,10}))?\.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# norms


def encode_norms(norms: Sequence[float | None]) -> list[int | str | None] | str:
    """Encode norms (or ratios) as hundredths of a decade: `round(100 * log10(norm))`, within 1.2 % of the value.

    Zero is -999, None (no gradient) null, NaN or inf "nan". Beyond `PACK_ABOVE` values: one byte each in base64, a
    twentieth of a decade, within 6 %.
    """
    if len(norms) > PACK_ABOVE:
        return base64.b64encode(bytes(_pack(norm) for norm in norms)).decode("ascii")
    return [_code(norm) for norm in norms]


def decode_norms(codes: Any) -> tuple[float | None, ...]:
    """Decode what `encode_norms` wrote: None, 0.0, nan or a positive float."""
    if isinstance(codes, str):
        return tuple(_unpack(byte) for byte in base64.b64decode(codes, validate=True))
    return tuple(_decode(code) for code in codes)


def _code(norm: float | None) -> int | str | None:
    if norm is None:
        return None
    if norm == 0.0:
        return -999
    return round(100 * math.log10(norm)) if math.isfinite(norm) and norm > 0 else "nan"


def _decode(code: Any) -> float | None:
    if code is None:
        return None
    if isinstance(code, bool) or not isinstance(code, int | float):
        return math.nan
    return 0.0 if code == -999 else 10.0 ** (max(-30000.0, min(30000.0, code)) / 100)


def _pack(norm: float | None) -> int:
    if norm is None:
        return 0
    if norm == 0.0:
        return 1
    if not (math.isfinite(norm) and norm > 0):
        return 255
    return min(254, max(2, round(20 * (math.log10(norm) + 8)) + 2))


def _unpack(byte: int) -> float | None:
    if byte == 0:
        return None
    if byte == 1:
        return 0.0
    return math.nan if byte == 255 else 10.0 ** ((byte - 2) / 20 - 8)


# ---------------------------------------------------------------------------------------------------------------------
# writer


class JournalWriter:
    """Appends records to one file; opened at the first record, flushed by time and size.

    Args:
        path: the file, created with mode 0600; an existing one is never touched.
        flush_seconds: a record waits at most this long for the next write to take it along.
        flush_bytes: most bytes kept back.
        on_failure: called once, with the reason, when the file cannot be written any more.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        flush_seconds: float = 0.5,
        flush_bytes: int = 65536,
        on_failure: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.path = Path(path)
        self.bytes = 0
        self.failed: str | None = None
        self.dropped: dict[str, int] = {}
        self._flush_seconds = flush_seconds
        self._flush_bytes = flush_bytes
        self._on_failure = on_failure
        self._clock = clock
        self._lock = threading.RLock()
        self._lines: list[str] = []
        self._pending = 0
        self._flushed_at = clock()
        self._started_at = clock()
        self._descriptor: int | None = None
        self._counts: dict[str, int] = {}

    def write(self, kind: str, /, *, now: bool = False, **fields: Any) -> None:
        """Append one record of `kind`; `now` takes it to the file at once. Never raises for the file's sake."""
        line = json.dumps({"k": kind, **fields}, separators=(",", ":"), default=str, allow_nan=True)
        with self._lock:
            self._lines.append(line)
            self._pending += len(line) + 1
            if now or self._pending > self._flush_bytes or self._clock() - self._flushed_at > self._flush_seconds:
                self.flush()

    def event(self, name: str, /, **fields: Any) -> None:
        """Append an event at once; beyond `EVENTS_KEPT` of one name only their number is kept."""
        with self._lock:
            count = self._counts[name] = self._counts.get(name, 0) + 1
            if count > EVENTS_KEPT:
                self.dropped[name] = count - EVENTS_KEPT
                return
            fields.setdefault("t", round(self._clock() - self._started_at, 4))
            self.write("event", now=True, e=name, **fields)

    def flush(self) -> None:
        """Take everything that waits to the file, in one write."""
        with self._lock:
            if not self._lines:
                return
            data = ("\n".join(self._lines) + "\n").encode("utf-8", "surrogateescape")
            self._lines.clear()
            self._pending = 0
            self._flushed_at = self._clock()
            if self.failed is not None:
                return
            try:
                if self._descriptor is None:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
                    self._descriptor = os.open(self.path, flags, 0o600)
                written = os.write(self._descriptor, data)
                self.bytes += written
                if written < len(data):
                    raise OSError(f"only {written} of {len(data)} bytes were taken")
            except OSError as error:
                self._fail(error.strerror or str(error))

    def close(self) -> None:
        """Flush and close the file; later records are dropped."""
        with self._lock:
            self.flush()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            self.failed = self.failed or "closed"

    def forget(self, path: str | os.PathLike[str]) -> None:
        """In a forked child: drop what the parent has not written yet and go on in a file of our own."""
        self._lock = threading.RLock()
        self._lines, self._pending, self._counts, self.dropped = [], 0, {}, {}
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
        self.path, self.bytes, self.failed = Path(path), 0, None

    def _fail(self, reason: str) -> None:
        self.failed = reason
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._on_failure is not None:
            self._on_failure(reason)


_current: JournalWriter | None = None


def current() -> JournalWriter | None:
    """Return the journal of this process, if it is being recorded."""
    return _current


def set_current(writer: JournalWriter | None) -> None:
    """Say which journal `emit` writes to."""
    global _current
    _current = writer


def emit(name: str, /, **fields: Any) -> None:
    """Write an event to the journal of this process, if it is being recorded."""
    if _current is not None:
        _current.event(name, **fields)


# ---------------------------------------------------------------------------------------------------------------------
# records, as they are read


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The first line: which program, where, since when."""

    schema: str
    argv: tuple[str, ...] = ()
    script: str = ""
    cwd: str = ""
    pid: int = 0
    ppid: int = 0
    main: bool = True
    rank: int = 0
    world_size: int = 1
    host: str = ""
    started: float = 0.0
    python: str = ""
    torch: str = ""
    gradctl: str = ""
    platform: str = ""
    device: str = ""
    threads: int = 0
    start: str = "run"
    grad: str = "on"
    budget: float = 0.01


@dataclass(frozen=True, slots=True)
class OptimizerRecord:
    """An optimizer, or (source `backward`) the stream of backwards of a program that has none."""

    o: int
    cls: str = ""
    names: tuple[str | None, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    lr: tuple[float, ...] = ()
    numel: int = 0
    frozen: int = 0
    thread: str = ""
    named: str = "none"
    roots: tuple[tuple[str, int], ...] = ()
    source: str = "optimizer"

    def name(self, index: int) -> str:
        """Return the FQN of tensor `index`, or `parameter <index>` where none is known."""
        known = self.names[index] if 0 <= index < len(self.names) else None
        return known if known is not None else f"parameter {index}"


@dataclass(frozen=True, slots=True)
class Clip:
    """Clipping in a block: calls, how many of them clipped, the worst ratio norm / limit, norms before clipping."""

    calls: int
    clipped: int
    worst_ratio: float
    limit: float
    mean_norm: float
    max_norm: float


@dataclass(frozen=True, slots=True)
class Block:
    """`c` steps from step `n` (1 is the first): losses and mean milliseconds a step."""

    o: int
    n: int
    c: int
    t: float
    loss: tuple[float, float, float] | None = None
    bad: int = 0
    microbatches: int = 0
    step_ms: float = 0.0
    backward_ms: float = 0.0
    optimizer_ms: float = 0.0
    data_ms: float = 0.0
    clip: Clip | None = None
    norm: tuple[float, float] | None = None

    @property
    def last(self) -> int:
        """The last step of the block."""
        return self.n + self.c - 1


@dataclass(frozen=True, slots=True)
class Maxima:
    """The largest gradient norm of each tensor over `c` measured steps among the steps `n` to `last`."""

    o: int
    n: int
    last: int
    c: int
    g: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One sampled step: gradient norms, update-to-weight ratios and what else was measured."""

    o: int
    n: int
    t: float
    g: tuple[float | None, ...]
    u: tuple[float | None, ...] = ()
    tot: float | None = None
    none: int = 0
    zero: int = 0
    dead: float | None = None
    cos: float | None = None
    lr: tuple[float, ...] = ()
    rss: float | None = None
    cuda: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened once: `e` is its name, `data` what `docs/journal.md` lists for that name."""

    e: str
    t: float = 0.0
    o: int | None = None
    n: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class SavedPlace:
    """Bytes kept for backward by one op or one source line."""

    where: str
    module: str | None
    bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What backward remembered at step `n`, weights excluded."""

    n: int
    total: int
    count: int
    method: str
    rows: tuple[SavedPlace, ...]


@dataclass(frozen=True, slots=True)
class End:
    """The last line; missing when the process was killed."""

    how: str
    code: int | None = None
    exc: Mapping[str, Any] | None = None
    steps: Mapping[int, int] = field(default_factory=dict[int, int])
    backwards: int = 0
    cost: float = 0.0
    one_off: float = 0.0
    wall: float = 0.0
    share: float = 0.0
    faults: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    rss: float | None = None
    not_seen: tuple[tuple[str, str], ...] = ()
    bytes: int = 0
    children: tuple[int, ...] = ()
    tiers: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Journal:
    """One process of a run, as its file tells it.

    Args:
        bad_lines: lines that could not be read (a last line that was cut is not counted).
        cut: the file ends in the middle of a line.
        newer: the file was written by a newer version; what is understood was read.
    """

    path: Path
    run: RunRecord | None = None
    optimizers: Mapping[int, OptimizerRecord] = field(default_factory=dict[int, OptimizerRecord])
    blocks: tuple[Block, ...] = ()
    maxima: tuple[Maxima, ...] = ()
    rows: tuple[Row, ...] = ()
    events: tuple[Event, ...] = ()
    saved: tuple[Saved, ...] = ()
    end: End | None = None
    bad_lines: int = 0
    cut: bool = False
    newer: bool = False

    @property
    def rank(self) -> int:
        """The rank, from the file's name."""
        match = FILE_NAME.fullmatch(self.path.name)
        return int(match.group(1)) if match else (self.run.rank if self.run else 0)

    @property
    def pid(self) -> int:
        """The process id of a child's journal (from the file's name), else that of the run record."""
        match = FILE_NAME.fullmatch(self.path.name)
        return int(match.group(2)) if match and match.group(2) else (self.run.pid if self.run else 0)

    @property
    def is_child(self) -> bool:
        """Whether this is a Python child of the program, not a rank of it."""
        match = FILE_NAME.fullmatch(self.path.name)
        return bool(match and match.group(2))

    def named(self, event: str) -> tuple[Event, ...]:
        """Return the events of that name, in order."""
        return tuple(found for found in self.events if found.e == event)


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory: the journals of its processes, ranks first and in order, then children."""

    directory: Path
    journals: tuple[Journal, ...]

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> Run:
        """Read every journal of a run directory.

        Raises:
            RunDirectoryError: there is no such directory, or no journal in it.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise RunDirectoryError(
                f"{folder} is not a run directory",
                why="it is a file" if folder.exists() else "it does not exist",
                fix="name a directory that `gradctl run` has made, such as gradctl-runs/train-...",
            )
        paths = [path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name) and path.is_file()]
        if not paths:
            raise RunDirectoryError(
                f"{folder} holds no journal",
                why="no file is named journal.rank<k>.jsonl; nothing was recorded there",
                fix="name a directory that `gradctl run` has made",
            )
        journals = [read(path) for path in paths]
        return Run(folder, tuple(sorted(journals, key=lambda j: (j.is_child, j.rank, j.pid))))

    @property
    def ranks(self) -> tuple[Journal, ...]:
        """The journals of the program's own processes, one a rank."""
        return tuple(journal for journal in self.journals if not journal.is_child)

    @property
    def children(self) -> tuple[Journal, ...]:
        """The journals of Python processes that the program started."""
        return tuple(journal for journal in self.journals if journal.is_child)


# ---------------------------------------------------------------------------------------------------------------------
# reader


def read(path: str | os.PathLike[str]) -> Journal:
    """Read a journal; lines that cannot be read are skipped and counted.

    Raises:
        BadJournal: the file cannot be opened, or holds lines but no journal record at all.
    """
    path = Path(path)
    parser = _Parser()
    try:
        with path.open("rb") as file:
            for line, whole in _lines(file):
                parser.take(line, whole)
    except OSError as error:
        raise BadJournal(f"{path} cannot be read", why=error.strerror or str(error)) from error
    if parser.understood == 0 and parser.bad_lines > 0:
        raise BadJournal(
            f"{path} is not a journal",
            why=f"none of its {parser.bad_lines} lines is a record of {SCHEMA}",
            fix="name a directory that `gradctl run` has made",
        )
    return parser.journal(path)


def _lines(file: Any) -> Iterator[tuple[bytes | None, bool]]:
    """Yield `(line, whole)`; a line beyond `LINE_LIMIT` is passed over piece by piece and yielded as None."""
    while True:
        line = file.readline(LINE_LIMIT)
        if not line:
            return
        if line.endswith(b"\n"):
            yield line, True
        elif len(line) < LINE_LIMIT:
            yield line, False
        else:
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_LIMIT)
            yield None, True


class _Parser:
    def __init__(self) -> None:
        self.understood = 0
        self.bad_lines = 0
        self._cut = False
        self._newer = False
        self._run: RunRecord | None = None
        self._end: End | None = None
        self._optimizers: dict[int, OptimizerRecord] = {}
        self._blocks: list[Block] = []
        self._maxima: list[Maxima] = []
        self._rows: list[Row] = []
        self._events: list[Event] = []
        self._saved: list[Saved] = []

    def take(self, line: bytes | None, whole: bool) -> None:
        if line is not None and not line.strip():
            return
        try:
            if line is None:
                raise ValueError("too long")
            record = json.loads(line)
            kind = record["k"]
            reader = _READERS.get(kind)
            if reader is not None:
                reader(self, record)
            elif not isinstance(kind, str):
                raise TypeError("k")
            self.understood += 1
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError):
            if whole:
                self.bad_lines += 1
            else:
                self._cut = True

    def journal(self, path: Path) -> Journal:
        return Journal(
            path=path,
            run=self._run,
            optimizers=self._optimizers,
            blocks=tuple(sorted(self._blocks, key=lambda b: (b.o, b.n))),
            maxima=tuple(sorted(self._maxima, key=lambda m: (m.o, m.n))),
            rows=tuple(sorted(self._rows, key=lambda r: (r.o, r.n))),
            events=tuple(self._events),
            saved=tuple(self._saved),
            end=self._end,
            bad_lines=self.bad_lines,
            cut=self._cut,
            newer=self._newer,
        )

    def run(self, r: dict[str, Any]) -> None:
        schema = r.get("schema")
        if not isinstance(schema, str) or not schema.startswith("gradctl.journal/"):
            raise ValueError("schema")
        self._newer = schema != SCHEMA
        self._run = RunRecord(
            schema=schema,
            argv=tuple(str(a) for a in r.get("argv") or ()),
            **{key: _text(r.get(key)) for key in ("script", "cwd", "host", "python", "torch", "gradctl", "platform")},
            **{key: _whole(r.get(key, 0)) for key in ("pid", "ppid", "rank", "threads")},
            world_size=max(1, _whole(r.get("world_size", 1))),
            device=_text(r.get("device")),
            main=bool(r.get("main", True)),
            started=_real(r.get("started", 0.0)),
            start=_text(r.get("start", "run")),
            grad=_text(r.get("grad", "on")),
            budget=_real(r.get("budget", 0.01)),
        )

    def opt(self, r: dict[str, Any]) -> None:
        names = tuple(None if name is None else str(name) for name in r.get("names") or ())
        groups = r.get("groups") or ()
        self._optimizers[_whole(r["o"])] = OptimizerRecord(
            o=_whole(r["o"]),
            cls=_text(r.get("cls")),
            names=names,
            shapes=tuple(tuple(_whole(d) for d in shape) for shape in r.get("shapes") or ()),
            dtypes=tuple(_text(d) for d in r.get("dtypes") or ()),
            groups=tuple(_whole(g) for g in groups) if groups else (0,) * len(names),
            lr=tuple(_real(value) for value in r.get("lr") or ()),
            numel=_whole(r.get("numel", 0)),
            frozen=_whole(r.get("frozen", 0)),
            thread=_text(r.get("thread")),
            named=_text(r.get("named", "none")),
            roots=tuple((str(cls), _whole(count)) for cls, count in r.get("roots") or ()),
            source=_text(r.get("source", "optimizer")),
        )

    def b(self, r: dict[str, Any]) -> None:
        loss, clip, norm = r.get("l"), r.get("clip"), r.get("tot")
        times = [_real(value) for value in r.get("ms") or (0, 0, 0, 0)]
        self._blocks.append(
            Block(
                o=_whole(r["o"]),
                n=_step(r["n"]),
                c=_step(r["c"]),
                t=_real(r.get("t", 0.0)),
                loss=(_real(loss[0]), _real(loss[1]), _real(loss[2])) if loss else None,
                bad=_whole(r.get("bad", 0)),
                microbatches=_whole(r.get("mb", 0)),
                step_ms=times[0],
                backward_ms=times[1],
                optimizer_ms=times[2],
                data_ms=times[3],
                clip=Clip(_whole(clip[0]), _whole(clip[1]), *(_real(value) for value in clip[2:6])) if clip else None,
                norm=(_real(norm[0]), _real(norm[1])) if norm else None,
            )
        )

    def mx(self, r: dict[str, Any]) -> None:
        first, count = _step(r["n"]), _step(r.get("c", 1))
        last = max(_step(r.get("to", first + count - 1)), first)
        self._maxima.append(Maxima(_whole(r["o"]), first, last, count, decode_norms(r["g"])))

    def row(self, r: dict[str, Any]) -> None:
        self._rows.append(
            Row(
                o=_whole(r["o"]),
                n=_step(r["n"]),
                t=_real(r.get("t", 0.0)),
                g=decode_norms(r["g"]),
                u=decode_norms(r.get("u") or ()),
                none=_whole(r.get("none", 0)),
                zero=_whole(r.get("zero", 0)),
                lr=tuple(_real(value) for value in r.get("lr") or ()),
                **{key: _maybe(r.get(key)) for key in ("tot", "dead", "cos", "rss", "cuda")},
            )
        )

    def event(self, r: dict[str, Any]) -> None:
        data = {key: value for key, value in r.items() if key not in ("k", "e", "t", "o", "n")}
        step, optimizer = r.get("n"), r.get("o")
        self._events.append(
            Event(
                e=str(r["e"]),
                t=_real(r.get("t", 0.0)),
                o=None if optimizer is None else _whole(optimizer),
                n=None if step is None else _whole(step),
                data=data,
            )
        )

    def saved(self, r: dict[str, Any]) -> None:
        places = tuple(
            SavedPlace(str(where), None if module is None else str(module), _whole(size), _whole(count))
            for where, module, size, count in r.get("rows") or ()
        )
        self._saved.append(
            Saved(_whole(r.get("n", 0)), _whole(r["total"]), _whole(r.get("count", 0)), _text(r.get("method")), places)
        )

    def end(self, r: dict[str, Any]) -> None:
        code, exc = r.get("code"), r.get("exc")
        self._end = End(
            how=_text(r.get("how")),
            code=None if code is None else _whole(code),
            exc=dict(exc) if exc else None,
            steps={int(o): _whole(n) for o, n in dict(r.get("steps") or {}).items()},
            backwards=_whole(r.get("backwards", 0)),
            **{key: _real(r.get(key, 0.0)) for key in ("cost", "one_off", "wall", "share")},
            faults=_whole(r.get("faults", 0)),
            dropped={str(name): _whole(count) for name, count in dict(r.get("dropped") or {}).items()},
            rss=_maybe(r.get("rss")),
            not_seen=tuple((str(what), str(why)) for what, why in r.get("not_seen") or ()),
            bytes=_whole(r.get("bytes", 0)),
            children=tuple(_whole(pid) for pid in r.get("children") or ()),
            tiers=dict(r.get("tiers") or {}),
        )


_READERS: dict[str, Callable[[_Parser, dict[str, Any]], None]] = {
    "run": _Parser.run,
    "opt": _Parser.opt,
    "b": _Parser.b,
    "mx": _Parser.mx,
    "row": _Parser.row,
    "event": _Parser.event,
    "saved": _Parser.saved,
    "end": _Parser.end,
}


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 1 << 62:
        raise TypeError("not a whole number")
    return value


def _step(value: Any) -> int:
    if _whole(value) < 1:
        raise ValueError("steps and counts are at least 1")
    return value


def _real(value: Any) -> float:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("not a number")
    return float(value)


def _maybe(value: Any) -> float | None:
    return None if value is None else _real(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("not text")
    return value
