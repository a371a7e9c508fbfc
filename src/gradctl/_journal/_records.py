"""The records of a journal, as they are read. `docs/journal.md` documents every field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "gradctl.journal/1"
FILE_NAME = re.compile(r"journal\.rank(\d{1,6})(?:\.pid(\d{1,10}))?\.jsonl")


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
    losses: Mapping[int, tuple[float | None, float | None]] = field(
        default_factory=dict[int, tuple[float | None, float | None]]
    )
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
