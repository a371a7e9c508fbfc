"""What is known of one optimizer while it is recorded. No reference to it, its parameters or its gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradctl._record._sketch import Places

NEVER = 1 << 62
"""A step that does not come."""


@dataclass(slots=True)
class Block:
    """Sums over the steps since the last block line; `timed` of its `steps` have a duration."""

    begin: int
    steps: int = 0
    timed: int = 0
    seconds: float = 0.0
    sum_backward: float = 0.0
    sum_optimizer: float = 0.0
    sum_data: float = 0.0
    losses: int = 0
    bad: int = 0
    microbatches: int = 0
    sum_loss: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf
    calls: int = 0
    clipped: int = 0
    norms: int = 0
    worst_ratio: float = 0.0
    limit: float = 0.0
    sum_norm: float = 0.0
    max_norm: float = 0.0
    totals: int = 0
    sum_total: float = 0.0
    max_total: float = 0.0


@dataclass(slots=True, eq=False)
class OptimizerState:
    """One optimizer, or the stream of backwards of a program without one.

    Args:
        o: its number in the journal.
        cls: class name.
        thread: name of the thread that steps it.
        source: "optimizer" or "backward".
    """

    o: int
    cls: str
    thread: str
    source: str = "optimizer"

    # tier 0: read and written in every step
    steps: int = 0
    next_row: int = 0
    next_norm: int = 0
    flush_at: int = 1
    flush_time: float = 0.0
    started: float = 0.0
    sampling: bool = False
    closure: bool = False

    # tier 1
    fast: bool = False
    num: int = -1
    num_groups: int = -1
    norm_gap: int = 1
    norm_cost: float = 0.0
    measured: int = 0
    samples: list[tuple[int, Tensor, list[int] | None]] = field(default_factory=list[Any])
    peak: list[float | None] | None = None
    totals: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    never: set[int] = field(default_factory=set[int])

    # tier 2
    keys: list[int] = field(default_factory=list[int])
    places: dict[int, Places] = field(default_factory=dict[int, Places])
    previous: Any = None
    row: Any = None
    row_cost: float = 0.0
    row_measured_at: int = 0
    rows: int = 0

    # blocks
    block: Block | None = None
    done: int = 0
    last_maxima: int = 0
    mark_backward: float = 0.0
    mark_optimizer: float = 0.0
    mark_data: float = 0.0
    last_end: float | None = None
    pattern: int = 0
    pattern_streak: int = 0
    pattern_written: int = 1

    # facts
    described: bool = False
    gone: bool = False
    shared: bool = False
    names: list[str | None] = field(default_factory=list[str | None])
    trainable: list[bool] = field(default_factory=list[bool])
    low_precision: list[bool] = field(default_factory=list[bool])
    frozen: int = 0
    bad_streak: int = 0
    loss_bad: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    skips: int = 0
    none_written: int = -1
    stalls: dict[int, int] = field(default_factory=dict[int, int])
    stall_share: dict[int, float] = field(default_factory=dict[int, float])
    stall_written: int = 0

    def name(self, index: int) -> str:
        """Return the name of tensor `index`, or one made of its index."""
        known = self.names[index] if index < len(self.names) else None
        return known if known is not None else f"parameter {index}"

    def drop(self) -> None:
        """Let go of every tensor."""
        self.samples, self.places = [], {}
        self.previous = self.row = None


class Costs:
    """Seconds spent by the recorder, and the time it is measured against.

    Args:
        clock: seconds, monotonic.
        meter: seconds of work of this thread: what another process takes from us is not our cost.
        budget: share of wall time since the first step.
    """

    __slots__ = ("began", "budget", "clock", "first_step", "meter", "one_off", "spent")

    def __init__(
        self, clock: Callable[[], float], budget: float, meter: Callable[[], float] = time.thread_time
    ) -> None:
        self.clock = clock
        self.meter = meter
        self.budget = budget
        self.began = clock()
        self.first_step: float | None = None
        self.spent = 0.0
        self.one_off = 0.0

    def elapsed(self, now: float) -> float:
        """Return seconds since the first step."""
        return 0.0 if self.first_step is None else now - self.first_step
