"""How one call of a model is cut into segments, and how the bytes of a step would move under a choice for each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gradctl._fit._profile import AGAIN, Call, Content, Profile, Step
from gradctl._recompute import Codec

Curve = NDArray[np.int64]


@dataclass
class Segment:
    """A run of operations that is made again as one.

    Attributes:
        call: the call that it belongs to.
        number: its place in the call.
        name: the module that begins it, if one does.
        steps: its operations that make something.
        contents: what they make, by key; what later segments need is left out, for it is always kept.
        saved: keys of those that autograd saves.
        again: the event at which backward comes to it.
    """

    call: Call
    number: int
    name: str
    steps: list[Step] = field(default_factory=list[Step])
    contents: dict[int, Content] = field(default_factory=dict[int, Content])
    saved: list[int] = field(default_factory=list[int])
    again: int = 0

    @cached_property
    def full(self) -> int:
        """Bytes of everything that it saves."""
        return sum(self.contents[key].nbytes for key in self.saved)

    @cached_property
    def likeness(self) -> object:
        """What two segments share when one solution serves both; times are left out."""
        order = {key: i for i, key in enumerate(key for step in self.steps for key in _made(step))}
        first = self.steps[0].index if self.steps else 0
        return (
            tuple(
                (step.index - first, step.name, tuple(order.get(key, -1) for key in step.reads), len(step.writes))
                for step in self.steps
            ),
            tuple((order[key], c.nbytes, bool(c.saved), c.final) for key, c in self.contents.items() if key in order),
        )


def _made(step: Step) -> Iterable[int]:
    return (*step.makes, *(made for _, made in step.writes))


@dataclass(frozen=True)
class Option:
    """One choice for a segment, by position in the segment's order.

    Args:
        keep: keys of contents that stay.
        pack: keys of saved contents that are packed.
        run: positions of operations that are called again.
        kept_bytes: bytes that stay between forward and backward, packed ones included.
        replay_bytes: the most that calling again has alive at once.
        seconds: what calling again takes.
    """

    keep: frozenset[int]
    pack: dict[int, tuple[Codec, int]]
    run: tuple[int, ...]
    kept_bytes: int
    replay_bytes: int
    seconds: float


class Layout:
    """A profile under one way to cut its calls.

    Args:
        profile: what a step did, keeping nothing.
        merge: how many neighbouring pieces of a call are one segment.
    """

    def __init__(self, profile: Profile, merge: int = 1) -> None:
        self.profile = profile
        self.merge = merge
        self.events = len(profile.ledger.events) + 1
        self.segments: list[Segment] = []
        self.starts: dict[int, tuple[int, ...]] = {}
        self._unheld: dict[int, Content] = {}
        self._lent: dict[int, Content] = {}
        for call in profile.calls:
            self._cut(call)

    def _cut(self, call: Call) -> None:
        fine = [0, *(position for position, _ in call.cuts if position > 0)]
        names = dict(call.cuts)
        starts = fine[:: self.merge]
        self.starts[call.number] = tuple(starts)
        segments = [Segment(call, i, names.get(start, "")) for i, start in enumerate(starts)]
        fine_cuts = [position for position, _ in call.cuts]

        def segment_of(position: int) -> int:
            return bisect_right(starts, position) - 1

        for step in call.steps.values():
            segments[segment_of(step.index)].steps.append(step)
        for content in call.contents.values():
            own = segment_of(content.operation)
            if any(segment_of(at) != own for at in (*content.read, *content.saved)):
                self._lent[content.key] = content  # a later segment begins from it
                continue
            segment = segments[own]
            segment.contents[content.key] = content
            if content.saved:
                segment.saved.append(content.key)
            fine_own = bisect_right(fine_cuts, content.operation)
            if any(bisect_right(fine_cuts, at) != fine_own for at in (*content.read, *content.saved)):
                self._unheld[content.key] = content
        order = sorted(call.replays.items())
        for segment in segments:
            begin = starts[segment.number]
            end = starts[segment.number + 1] if segment.number + 1 < len(starts) else len(call.functions)
            own = {bisect_right(fine_cuts, p) for p in (*(c for c in fine_cuts if begin <= c < end), begin)}
            times = [event for fine_segment, event in order if fine_segment in own]
            segment.again = min(times, default=0)
        self.segments += [s for s in segments if s.steps and s.saved and s.again]

    # -- bytes over time ----------------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> Curve:
        """Bytes above what stood before, after each event, if segments kept nothing and made nothing again."""
        ledger = self.profile.ledger
        change = np.zeros(self.events + 1, dtype=np.int64)
        for i, (nbytes, entry) in enumerate(ledger.events):
            if entry.where != AGAIN:
                change[i + 1] += nbytes
        for content in self._unheld.values():  # held by the profile for a segment that is now part of the same one
            self._add(change, content.end, content.entry.died, -content.nbytes)
        base = np.cumsum(change)[: self.events]
        for at, nbytes in self.profile.work.items():
            base[at] += nbytes
        return base

    def _add(self, change: Curve, begin: int, end: int | None, nbytes: int) -> None:
        stop = self.events if end is None else end
        if stop > begin:
            change[begin] += nbytes
            change[min(stop, self.events)] -= nbytes

    def _gone(self, content: Content) -> int:
        """Return the event after which nothing but a choice keeps a content."""
        if content.key in self._unheld:
            return content.end
        return content.entry.died if content.entry.died is not None else self.events

    def moves(self, segment: Segment, option: Option) -> Curve:
        """Return the bytes that an option adds to the base after each event."""
        change = np.zeros(self.events + 1, dtype=np.int64)
        for key in segment.saved:
            content = segment.contents[key]
            gone = self._gone(content)
            if key in option.keep:
                self._add(change, gone, content.used_up, content.nbytes)
            elif key in option.pack:
                self._add(change, gone, content.used_up, option.pack[key][1])
            else:
                self._add(change, segment.again, content.used_up, content.nbytes)
        for key in option.keep:
            content = segment.contents[key]
            if not content.saved:
                self._add(change, self._gone(content), segment.again, content.nbytes)
        steps = segment.call.steps
        for key in {key for index in option.run for key in steps[index].reads if key in self._lent}:
            content = self._lent[key]
            if content.entry.died is not None and content.entry.died < segment.again:
                self._add(change, content.entry.died, segment.again, content.nbytes)
        return np.cumsum(change)[: self.events]

    def peaks(self, chosen: Sequence[tuple[Segment, Option]]) -> tuple[int, int]:
        """Return the highest bytes above what stood before under a choice, and the event at which they are reached."""
        total = self.base.copy()
        for segment, option in chosen:
            total += self.moves(segment, option)
        at = int(total.argmax())
        highest = int(total[at])
        for segment, option in chosen:
            before = int(total[max(segment.again - 1, 0)])
            if before + option.replay_bytes > highest:
                highest, at = before + option.replay_bytes, segment.again
        return highest, at


def replay_bytes(segment: Segment, run: Sequence[int], targets: frozenset[int]) -> int:
    """Return the most bytes that calling these operations again has alive at once."""
    steps = [step for step in segment.steps if step.index in set(run)]
    last: dict[int, int] = {}
    for step in steps:
        for key in step.reads:
            last[key] = step.index
    alive: dict[int, int] = {}
    highest = 0
    for step in steps:
        for key in step.makes:
            if key in segment.contents:
                alive[key] = segment.contents[key].nbytes
        copies = step.work
        for before, made in step.writes:
            if made in segment.contents:
                alive[made] = segment.contents[made].nbytes
            if before in alive and before not in targets and last.get(before, -1) <= step.index:
                del alive[before]
        highest = max(highest, sum(alive.values()) + copies)
        for key in [k for k in alive if k not in targets and last.get(k, -1) <= step.index]:
            del alive[key]
    return highest
