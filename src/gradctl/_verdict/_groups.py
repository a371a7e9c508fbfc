"""The order of a step as the journal tells it: groups of operations between two steps. Judges nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gradctl._journal import Event, Journal
from gradctl._verdict._training import field, real, short_name, texts, whole

STEADY = 0.8
"""What holds in this share of the groups that could show it is a habit of the program."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the source: its file as the code names it, its line and the text of that line."""

    file: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Op:
    """One operation; kinds and flags are those of `docs/journal.md`."""

    kind: str
    site: int
    flags: str
    which: int
    reach: int

    def has(self, flags: str) -> bool:
        """Whether every one of `flags` is set."""
        return all(flag in self.flags for flag in flags)

    def lacks(self, flags: str) -> bool:
        """Whether none of `flags` is set."""
        return not any(flag in self.flags for flag in flags)


@dataclass(frozen=True)
class Group:
    """A group of operations that came `count` times in the steps that were watched."""

    count: int
    after: str
    end: str
    loop: str
    ops: tuple[Op, ...]
    norm: float | None
    limit: float | None
    scale: float | None

    @cached_property
    def last_step(self) -> int:
        """Index of the optimizer's own step; the number of operations where a scaler skipped it."""
        own = [i for i, op in enumerate(self.ops) if op.kind == "S" and op.has("o")]
        return own[-1] if own else len(self.ops)

    @property
    def step(self) -> Op | None:
        """The optimizer's own step."""
        return self.ops[self.last_step] if self.last_step < len(self.ops) else None

    @cached_property
    def scaler_step(self) -> int | None:
        """Index of the scaler's step for this optimizer."""
        own = [i for i, op in enumerate(self.ops) if op.kind == "t" and op.has("o")]
        return own[-1] if own else None

    @cached_property
    def backwards(self) -> tuple[tuple[int, Op], ...]:
        """Index and operation of the backwards whose gradients the step takes: the last ones that add up."""
        found: list[tuple[int, Op]] = []
        for index, op in enumerate(self.ops[: self.last_step]):
            if op.kind == "B" and op.has("r"):
                found = [*found, (index, op)] if op.has("c") else [(index, op)]
        return tuple(found)

    @cached_property
    def microbatches(self) -> tuple[tuple[int, Op], ...]:
        """Those of `backwards` that are the microbatches of one batch: one line, the same gradients, and evidence.

        Evidence is a step that the source counts, a loop that is named so or that goes over parts of a batch, a batch
        of its own from one loader for each, or a loss that is divided in each. Without it several backwards may be
        several losses, tasks or players, whose sum is meant.
        """
        for site in dict.fromkeys(op.site for _, op in self.backwards):
            ops = [(index, op) for index, op in self.backwards if op.site == site]
            plain = all(op.lacks("kilq") for _, op in ops)
            between = self.ops[ops[0][0] : ops[-1][0]]
            plain = plain and not any(op.kind == "S" for op in between)  # another player's
            if site >= 0 and len(ops) > 1 and plain and len({op.reach for _, op in ops}) == 1 and self._is_one(ops):
                return tuple(ops)
        return ()

    def _is_one(self, ops: Sequence[tuple[int, Op]]) -> bool:
        loaders = {op.which for _, op in ops}
        fetched = len(loaders) == 1 and -1 not in loaders
        return bool(self.loop) or fetched or all(op.has("d") for _, op in ops)

    def own(self, kind: str, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Op]]:
        """Yield index and operation of that kind that are about this optimizer, from `begin` to before `end`."""
        for index in range(begin, len(self.ops) if end is None else end):
            op = self.ops[index]
            if op.kind == kind and op.has("o"):
                yield index, op

    @property
    def is_edited(self) -> bool:
        """Whether the program itself changed gradients on their way to the step, or may have done so in a hook."""
        ops = [op for op in self.ops[: self.last_step + 1] if op.kind in ("C", "S") and op.has("o")]
        return any(not op.lacks("eh") for op in (*ops, *(op for _, op in self.backwards)))


@dataclass(frozen=True)
class Order:
    """What a journal tells of the steps of one optimizer, that with the number `o`."""

    journal: Journal
    o: int

    @cached_property
    def sites(self) -> Mapping[int, Site]:
        """The places, by their numbers."""
        found: dict[int, Site] = {}
        for event in self.journal.named("site"):
            line, file = whole(event.data.get("line"), 0), field(event.data, "file")
            if line and file:
                found[whole(event.data.get("s"), -1)] = Site(file, line, short_text(field(event.data, "text")))
        return found

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, each distinct one once; a later line about one replaces an earlier one."""
        found: dict[int, Group] = {}
        for event in self._told("order"):
            group = _group(event)
            if group is not None:
                found[whole(event.data.get("f"), -1)] = group
        return tuple(found.values())

    @cached_property
    def watched(self) -> int:
        """How many groups were watched."""
        return sum(group.count for group in self.groups)

    @cached_property
    def accumulation(self) -> tuple[int, int] | None:
        """How many microbatches a step has, and the number of their place; None if the program does not accumulate."""
        counts: Counter[tuple[int, int]] = Counter()
        for group in self.groups:
            if group.microbatches:
                counts[len(group.microbatches), group.microbatches[0][1].site] += group.count
        if not counts:
            return None
        found, count = counts.most_common(1)[0]
        return found if count >= 2 and count >= 0.5 * sum(counts.values()) else None

    @property
    def step_site(self) -> int:
        """The place of the optimizer's step; -1 if it is not known."""
        return next((group.step.site for group in self.groups if group.step is not None), -1)

    def left(self) -> tuple[int, int]:
        """Return how many backwards at the place of the microbatches no step followed: at the end, and before zeroing.

        A whole group is no rest, and what stands at other lines too is not known to belong to it.
        """
        if self.accumulation is None:
            return 0, 0
        size, site = self.accumulation
        at_end = 0
        for event in self._told("left"):
            count = whole(event.data.get("count"), 0)
            if count < size and _all_at(event.data.get("sites"), site):
                at_end = count
        cleared = 0
        for event in self.journal.named("cleared"):
            sites = event.data.get("sites")
            if isinstance(sites, list) and 0 < len(sites) < size and _all_at(sites, site):
                cleared += len(sites) * whole(event.data.get("count"), 0)
        return at_end, cleared

    def told(self, name: str) -> tuple[Event, ...]:
        """Return the events of that name about this optimizer, or about none."""
        return tuple(e for e in self.journal.named(name) if e.o in (None, self.o))

    def _told(self, name: str) -> tuple[Event, ...]:
        return tuple(e for e in self.journal.named(name) if e.o == self.o)


def short_text(text: str) -> str:
    """Return a source line that can be shown."""
    return "" if len(text) > 200 else short_name(text) if not text.isprintable() else text


def _all_at(sites: Any, site: int) -> bool:
    return isinstance(sites, list) and bool(sites) and all(found == site for found in sites)


def _group(event: Event) -> Group | None:
    data = event.data
    raw = data.get("ops")
    if not isinstance(raw, list):
        return None
    ops: list[Op] = []
    for one in raw:
        if not isinstance(one, list) or len(one) != 5:
            return None
        kind, site, flags, which, reach = one
        if not (isinstance(kind, str) and isinstance(flags, str) and all(type(n) is int for n in (site, which, reach))):
            return None
        ops.append(Op(kind, site, flags, which, reach))
    words = texts([data.get("after"), data.get("end"), data.get("loop") or ""])
    return Group(
        max(1, whole(data.get("count"), 1)), words[0], words[1], words[2], tuple(ops), real(data.get("norm")),
        real(data.get("limit")), real(data.get("scale")),
    )  # fmt: skip
