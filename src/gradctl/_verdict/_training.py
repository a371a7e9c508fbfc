"""What one optimizer of one process did, read off its journal: steps, losses, gradients, non-finite values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from gradctl._journal import Block, Event, Journal, Maxima, OptimizerRecord, Row, RunRecord

if TYPE_CHECKING:
    from gradctl._verdict._groups import Order

SAMPLED_ROWS = 64  # a median over this many rows is as good as one over all of them
LONGEST_NAME = 100


@dataclass(frozen=True)
class NonFinite:
    """The non-finite values of one optimizer.

    Args:
        where: what was non-finite first: `gradient`, `loss` or `weight`.
        first: the step at which that was.
        steps: how many steps had such a value.
        lasting: whether it never ended: weights are poisoned.
        share: how much of the tensors is non-finite at the end, 0 to 1.
        names: the first parameters concerned.
        count: how many parameters were concerned at that step.
        of: out of how many.
        skipped: whether a loss scaler skipped every such step, so that no weight took one.
    """

    where: str
    first: int
    steps: int
    lasting: bool
    share: float
    names: tuple[str, ...]
    count: int
    of: int
    skipped: bool = False


@dataclass(frozen=True)
class Training:
    """One optimizer (or the backwards of a program without one) of one process."""

    journal: Journal
    record: OptimizerRecord
    blocks: tuple[Block, ...]
    maxima: tuple[Maxima, ...]
    rows: tuple[Row, ...]

    @property
    def id(self) -> int:
        """The optimizer's id in its journal."""
        return self.record.o

    @cached_property
    def steps(self) -> int:
        """How many steps were taken."""
        seen = [b.last for b in self.blocks] + [r.n for r in self.rows] + [m.n for m in self.maxima]
        ended = self.journal.end.steps.get(self.id, 0) if self.journal.end else 0
        return max(0, ended, max(seen, default=0))

    @cached_property
    def tensors(self) -> int:
        """How many tensors the optimizer has."""
        return max(len(self.record.names), len(self.record.shapes))

    @cached_property
    def order(self) -> Order:
        """What the journal tells of the order of its steps."""
        from gradctl._verdict._groups import Order  # it reads journals with the functions below

        return Order(self.journal, self.id)

    @property
    def weight(self) -> int:
        """Steps x elements: how much of the run this optimizer is."""
        return self.steps * max(1, self.record.numel)

    @cached_property
    def microbatches(self) -> int:
        """Accumulating backwards before its steps, all together."""
        return sum(b.microbatches for b in self.blocks)

    @cached_property
    def losses(self) -> tuple[Block, ...]:
        """The blocks that saw a loss, finite or not."""
        return tuple(b for b in self.blocks if b.loss is not None or b.bad)

    def name(self, index: int) -> str:
        """Return the name of tensor `index`, cut to a length that can be shown."""
        return short_name(self.record.name(index))

    def is_matrix(self, index: int) -> bool:
        """Whether tensor `index` has two dims or more; vectors (biases, norms) follow rules of their own."""
        shapes = self.record.shapes
        return index < len(shapes) and len(shapes[index]) >= 2 and math.prod(shapes[index]) > 1

    @cached_property
    def measured(self) -> tuple[tuple[int, tuple[float | None, ...]], ...]:
        """Every `(step, norms)` that was measured, from the last to the first."""
        both = [(r.n, r.g) for r in self.rows] + [(m.n, m.g) for m in self.maxima]
        return tuple(sorted(both, key=lambda pair: -pair[0]))

    @cached_property
    def seen(self) -> frozenset[int]:
        """Tensors that were seen with a gradient, be it zero."""
        missing = set(range(self.tensors))
        for _, norms in self.measured:
            missing -= {i for i in missing if i < len(norms) and norms[i] is not None}
            if not missing:
                break
        return frozenset(range(self.tensors)) - missing

    @cached_property
    def never(self) -> tuple[int, tuple[str, ...]]:
        """How many parameters never got a gradient, and the names of the first of them.

        The recorder's own event decides, because only it tells a frozen parameter from a forgotten one; what was seen
        with a gradient later is taken off. Backwards without an optimizer are steps only by their gradients: a few of
        them, or none that was measured, prove nothing.
        """
        if self.record.source == "backward" and (self.steps < 3 or not self.measured):
            return 0, ()
        if any(e.data.get("what") == "gradients" for e in self.journal.named("not_seen")):
            return 0, ()  # they were applied and dropped where nobody sees them
        told = [e for e in self.journal.named("none") if e.o in (None, self.id)]
        if not told:
            return 0, ()
        last = told[-1]
        names = texts(last.data.get("params"))
        reached = {self.record.name(i) for i in self.seen}
        left = tuple(name for name in names if name not in reached)
        count = max(whole(last.data.get("count"), len(names)) - (len(names) - len(left)), len(left))
        count = min(count, max(self.tensors, len(left)))
        meant = self.kept_away("none") - self.seen
        if meant and count < self.tensors - max(0, self.record.frozen):  # nobody means to train nothing at all
            said = {self.record.name(i) for i in meant}
            left = tuple(name for name in left if name not in said)
            count = max(count - len(meant), len(left))
        return count, left

    def kept_away(self, how: Literal["none", "zero"]) -> frozenset[int]:
        """Return the tensors from which the program keeps the gradient by a call of gradctl.

        Args:
            how: what comes back instead: no gradient, or one of zeros.
        """
        told = [e for e in self.journal.named("kept_away") if e.o == self.id and e.data.get("how") == how]
        listed: Any = told[-1].data.get("tensors") if told else None
        return frozenset(i for i in listed if isinstance(i, int)) if isinstance(listed, list) else frozenset()

    @cached_property
    def expected(self) -> int:
        """How many parameters should get a gradient: all but the frozen ones."""
        return max(self.tensors - max(0, self.record.frozen), self.never[0])

    @cached_property
    def reached(self) -> int | None:
        """How many parameters got a gradient; None when none was ever measured."""
        if self.never[0]:
            return max(0, self.expected - self.never[0])
        return min(len(self.seen), self.expected) if self.rows or self.maxima else None

    @cached_property
    def late_rows(self) -> tuple[Row, ...]:
        """Rows of the second half, where a warm-up no longer speaks; at most `SAMPLED_ROWS` of them."""
        late = [r for r in self.rows if r.n > self.steps // 2]
        stride = -(-len(late) // SAMPLED_ROWS) or 1
        return tuple(late[::stride])

    def ratios(self, rows: Sequence[Row]) -> dict[int, float]:
        """Return the median update-to-weight ratio of each matrix over `rows`."""
        found: dict[int, float] = {}
        for i in range(self.tensors):
            if self.is_matrix(i):
                values = [u for r in rows if i < len(r.u) and (u := r.u[i]) is not None and math.isfinite(u)]
                if values:
                    found[i] = median(values)
        return found

    @cached_property
    def late_norms(self) -> tuple[tuple[float | None, ...], ...]:
        """Gradient norms measured in the second half, sampled rows and block maxima alike; at most `SAMPLED_ROWS`."""
        late = [norms for step, norms in self.measured if step > self.steps // 2]
        stride = -(-len(late) // SAMPLED_ROWS) or 1
        return tuple(late[::stride])

    def norms(self, measured: Sequence[tuple[float | None, ...]]) -> dict[int, float]:
        """Return the median gradient norm of each tensor over `measured`, non-finite ones left out."""
        found: dict[int, float] = {}
        for i in range(self.tensors):
            values = [g for norms in measured if i < len(norms) and (g := norms[i]) is not None and math.isfinite(g)]
            if values:
                found[i] = median(values)
        return found

    @cached_property
    def zero_since(self) -> dict[int, int]:
        """For each tensor whose gradient is exactly zero at the end: the first step of that stretch."""
        since: dict[int, int] = {}
        running: set[int] | None = None
        for step, norms in self.measured:
            if running is None:
                running = {i for i, g in enumerate(norms) if g == 0.0}
            running -= {i for i in running if i < len(norms) and norms[i] is not None and norms[i] != 0.0}
            if not running:
                break
            since.update((i, step) for i in running if i < len(norms) and norms[i] == 0.0)
        return since

    @cached_property
    def is_all_zero(self) -> bool:
        """Whether gradients were measured and every one of them was exactly zero."""
        return bool(self.seen) and not any(g for _, norms in self.measured for g in norms)

    @cached_property
    def skipped(self) -> int:
        """Steps that were skipped, by a loss scaler or by `gradctl.Step`."""
        told = sum(1 for e in self.journal.named("skip") if e.o in (None, self.id))
        dropped = self.journal.end.dropped.get("skip", 0) if self.journal.end else 0
        return told + (dropped if told else 0)

    @cached_property
    def who_skips(self) -> str:
        """What left steps out: a loss scaler has a scale, `gradctl.Step` by itself has none."""
        scales = [e.data.get("scale") for e in self.journal.named("skip") if e.o in (None, self.id)]
        return "gradctl.Step" if scales and all(scale is None for scale in scales) else "the loss scaler"

    @cached_property
    def last_loss(self) -> float | None:
        """The last loss that was passed to backward, as the `end` record tells it; None when it does not."""
        told = self.journal.end.losses.get(self.id) if self.journal.end else None
        return told[1] if told else None

    @cached_property
    def nonfinite(self) -> NonFinite | None:
        """What was NaN or inf, or None."""
        whole_run = self._first_bad(0)
        if not whole_run:
            return None
        # losses that were finite again end what came before: a run that is lost is lost since the last of them
        good = max((b.n for b in self.losses if b.loss is not None and not b.bad), default=0)
        final = self._first_bad(good)
        skipped = self._all_skipped
        lasting = (
            bool(final) and not skipped and self._is_bad_at_the_end(min(final.values()), weights="weight" in final)
        )
        first = final if lasting else whole_run
        # a loss comes before its own gradient: in the same step, it is the cause
        where = min(first, key=lambda what: (first[what], ("loss", "gradient", "weight").index(what)))
        start = first[where]
        events = self._nonfinite_events
        told = next((e for e in events if e.n == first.get("gradient") and e.data.get("what") == "grad"), None)
        if lasting:
            steps = max(1, self.steps - start + 1)
        else:
            steps = len({e.n for e in events if e.data.get("what") != "weight"} | set(self._bad_rows))
            steps = max(1, steps, min(sum(b.bad for b in self.blocks), self.steps))
        names = tuple(short_name(n) for n in texts(told.data.get("params"))) if told else ()
        count = whole(told.data.get("count"), len(names)) if told else 0
        of = max(self.tensors, count)
        return NonFinite(where, start, steps, lasting, self._bad_share(start), names, count, of, skipped)

    @cached_property
    def _nonfinite_events(self) -> tuple[Event, ...]:
        return tuple(e for e in self.journal.named("nonfinite") if e.o in (None, self.id) and e.n is not None)

    @cached_property
    def _bad_rows(self) -> tuple[int, ...]:
        return tuple(r.n for r in self.rows if any(g is not None and math.isnan(g) for g in r.g))

    def _first_bad(self, since: int) -> dict[str, int]:
        """For what was non-finite (`gradient`, `loss`, `weight`): the first such step from `since` on."""
        first: dict[str, int] = {}
        for e in self._nonfinite_events:
            n = e.n or 0
            if n >= since:
                what = {"grad": "gradient", "loss": "loss", "weight": "weight"}.get(str(e.data.get("what")), "gradient")
                first[what] = min(first.get(what, n), n)
        bad = [b.n for b in self.blocks if b.bad and b.n >= since]
        if bad:
            # inside a longer block the step is not known better than this
            first.setdefault("loss", bad[0])
        rows = [n for n in self._bad_rows if n >= since]
        # the stretch of a maximum says only that it happened somewhere in it
        rows = rows or [m.n for m in self.maxima if m.n >= since and any(g is not None and math.isnan(g) for g in m.g)]
        if rows:
            first.setdefault("gradient", min(rows))
        return first

    @cached_property
    def _all_skipped(self) -> bool:
        """Whether a loss scaler skipped every step in which something was non-finite."""
        skips = [e.n for e in self.journal.named("skip") if e.o in (None, self.id)]
        events = {e.n for e in self._nonfinite_events}
        if not skips or not events or "weight" in {e.data.get("what") for e in self._nonfinite_events}:
            return False
        if sum(n is not None and n > self.steps for n in skips) > 2:
            return False  # the run ended in them
        dropped = self.journal.end.dropped if self.journal.end else {}
        return events <= set(skips) and not dropped.get("nonfinite") and not self._bad_rows

    def _bad_share(self, start: int) -> float:
        for step, norms in self.measured:
            if step < start:
                break
            known = [g for g in norms if g is not None]
            if known:
                return sum(math.isnan(g) for g in known) / len(known)
        return 0.0

    def _is_bad_at_the_end(self, start: int, *, weights: bool) -> bool:
        """Whether what is non-finite since `start` was so to the end, as far as the journal tells."""
        if self.last_loss is not None and not math.isfinite(self.last_loss):
            return True
        events = [e for e in self._nonfinite_events if self.last_loss is None or e.data.get("what") == "grad"]
        if any((e.n or 0) >= self.steps for e in events):
            return True  # the last update was such a one
        later = next((step for step, _ in self.measured), 0)
        after = [b for b in self.losses if b.n > start]
        if self.last_loss is None and after and (after[-1].loss is None or not after[-1].bad):
            return after[-1].loss is None
        if later > start:
            return self._bad_share(start) > 0
        return weights and self.last_loss is None

    def milliseconds(self) -> tuple[float, float, float, float] | None:
        """Return mean ms a step: whole, backward, optimizer, data; without the first steps where there are more."""
        blocks = [b for b in self.blocks if b.step_ms > 0 and math.isfinite(b.step_ms)]
        warm = [b for b in blocks if b.n > 3] or blocks
        count = sum(b.c for b in warm)
        if not count:
            return None
        picked = ((b.step_ms, b.backward_ms, b.optimizer_ms, b.data_ms) for b in warm)
        sums = [math.fsum(v * b.c for v, b in zip(column, warm, strict=True)) for column in zip(*picked, strict=True)]
        return sums[0] / count, sums[1] / count, sums[2] / count, sums[3] / count

    def clipping(self) -> tuple[int, int, float, float] | None:
        """Return calls, how many clipped, the last limit and the mean norm before clipping; None if never called."""
        clips = [b.clip for b in self.blocks if b.clip is not None and b.clip.calls > 0]
        calls = sum(c.calls for c in clips)
        if not calls:
            return None
        means = [c.mean_norm * c.calls for c in clips if math.isfinite(c.mean_norm)]
        return calls, sum(c.clipped for c in clips), clips[-1].limit, math.fsum(means) / calls


def trainings(journal: Journal) -> tuple[Training, ...]:
    """Return the optimizers of a journal that took a step, in order of their ids.

    Records that speak of an optimizer without an `opt` line (it was lost or unreadable) get a nameless one.
    """
    ids = set(journal.optimizers) | {x.o for group in (journal.blocks, journal.maxima, journal.rows) for x in group}
    found: list[Training] = []
    for o in sorted(ids):
        blocks = {b.n: b for b in journal.blocks if b.o == o}  # a repeated block counts once
        training = Training(
            journal,
            journal.optimizers.get(o) or OptimizerRecord(o),
            tuple(blocks.values()),
            tuple(m for m in journal.maxima if m.o == o),
            tuple({r.n: r for r in journal.rows if r.o == o}.values()),
        )
        if training.steps:
            found.append(training)
    return tuple(found)


def command(record: RunRecord | None, *, short: bool = False) -> str:
    """The command as a person would type it, for one line; `short` names the script without its folder."""
    if record is None:
        return ""
    if not record.argv:
        return record.script
    first = record.argv[0]
    if short and record.script and first.endswith(f"/{record.script}"):
        first = record.script
    return " ".join((first, *record.argv[1:]))


def texts(value: Any) -> tuple[str, ...]:
    """Return `value` as a tuple of texts, whatever a journal holds in its place."""
    return tuple(str(v) for v in value) if isinstance(value, list | tuple) else ()


def whole(value: Any, default: int) -> int:
    """Return `value` if it is a whole number that makes sense as a count, else `default`."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else default


def real(value: Any) -> float | None:
    """Return `value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def short_name(name: str) -> str:
    """Cut a name that no line could show."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def field(data: Mapping[str, Any] | None, key: str) -> str:
    """Return a text field of an exception or event, or an empty text."""
    value = data.get(key) if data else None
    return value if isinstance(value, str) else ""
