"""From the records of a journal to arrays that can be drawn: curves by step and norms by tensor. Nothing is judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradctl._journal import Block, Journal, Maxima, OptimizerRecord, Row

Floats = NDArray[np.float64]
NO_GRADIENT = -1.0
"""Stands in arrays of norms for a tensor without a gradient; NaN stands for NaN or inf."""


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A value by step; NaN where nothing finite was seen.

    Attributes:
        x: step, or the middle of a stretch of steps, ascending.
        y: mean over the stretch.
        low: lowest value in it.
        high: highest value in it.
        weight: steps in it.
    """

    x: Floats
    y: Floats
    low: Floats
    high: Floats
    weight: Floats

    @staticmethod
    def of(points: Iterable[tuple[float, float, float, float, float]]) -> Curve:
        """Make a curve from `(x, y, low, high, weight)`."""
        table = np.array(list(points), dtype=np.float64).reshape(-1, 5)
        return Curve(*(table[:, k] for k in range(5)))

    @property
    def seen(self) -> bool:
        """Whether any value is finite."""
        return bool(np.isfinite(self.y).any())

    @property
    def first(self) -> float:
        """The first finite mean."""
        return float(self.y[np.isfinite(self.y)][0])

    @property
    def last(self) -> float:
        """The last finite mean."""
        return float(self.y[np.isfinite(self.y)][-1])

    def thinned(self, most: int, last_step: int) -> Curve:
        """Join neighbouring stretches until at most `most` are left; means are weighted, extremes are kept."""
        if len(self.x) <= most:
            return self
        bins = np.minimum((self.x * most / (last_step + 1)).astype(int), most - 1)
        points: list[tuple[float, float, float, float, float]] = []
        for where in np.split(np.arange(len(bins)), np.flatnonzero(np.diff(bins)) + 1):
            good = where[np.isfinite(self.y[where])]
            if len(good):
                weight = self.weight[good]
                mean = float((self.y[good] / len(good) * (weight / weight.mean())).sum())
                low, high = float(np.nanmin(self.low[good])), float(np.nanmax(self.high[good]))
                points.append((float(self.x[where].mean()), min(max(mean, low), high), low, high, float(weight.sum())))
            else:
                points.append(
                    (float(self.x[where].mean()), math.nan, math.nan, math.nan, float(self.weight[where].sum()))
                )
        return Curve.of(points)

    def centred_mean(self, share: float = 0.04, *, log: bool = False) -> Floats:
        """Return a running mean over a centred window; it shrinks at the ends, so that it does not lag.

        Args:
            share: width of the window, of the finite values.
            log: average logarithms, as an eye does on a logarithmic scale; all values are above 0.
        """
        if log:
            return 10.0 ** Curve(self.x, np.log10(self.y), self.low, self.high, self.weight).centred_mean(share)
        half = max(1, round(float(np.isfinite(self.y).sum()) * share / 2))
        smooth = np.full(len(self.y), np.nan)
        for k in range(len(self.y)):
            if math.isfinite(self.y[k]):
                reach = min(half, k, len(self.y) - 1 - k)
                window = slice(k - reach, k + reach + 1)
                good = np.isfinite(self.y[window])
                weight = self.weight[window][good]
                smooth[k] = float((self.y[window][good] * (weight / weight.sum())).sum())
        return smooth


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Norms of every tensor at some stretches of steps, in order.

    Attributes:
        first: first step of each stretch, shape [samples].
        last: last step of each stretch, shape [samples].
        values: largest norm in the stretch, shape [samples, tensors]; `NO_GRADIENT`, 0, NaN or positive.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    values: Floats

    def paint(self, columns: int, last_step: int, values: Floats | None = None) -> Floats:
        """Spread the samples over `columns` equal stretches of the run; the largest wins, gaps repeat what was last.

        Args:
            columns: cells in a row.
            last_step: the step at the right edge.
            values: what to paint instead of `values`, shape [samples, rows].

        Returns:
            Cells, shape [rows, columns].
        """
        source = (self.values if values is None else values).T
        cells = np.full((len(source), columns), NO_GRADIENT)
        painted = np.zeros(columns, dtype=bool)
        for k, (first, last) in enumerate(zip(self.first.tolist(), self.last.tolist(), strict=True)):
            left = min(columns - 1, (first - 1) * columns // last_step)
            right = max(left + 1, min(columns, -(-last * columns // last_step)))
            here = source[:, k : k + 1]
            worst = np.maximum(cells[:, left:right], here)  # NaN wins, then the largest
            cells[:, left:right] = np.where(painted[left:right], worst, here)
            painted[left:right] = True
        if not painted.any():
            return cells
        held = np.maximum.accumulate(np.where(painted, np.arange(columns), -1))
        start = int(np.flatnonzero(painted)[0])
        filled = cells[:, np.where(held < 0, start, held)]
        filled[:, :start][np.isnan(filled[:, :start])] = NO_GRADIENT  # NaN does not reach back
        return filled


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What one optimizer left, or several that step together (one a stage).

    Attributes:
        optimizers: the records, the main one first.
        names: name of each tensor, or None.
        shapes: shape of each tensor; empty where unknown.
        last_step: the last step seen; 0 if there was none.
        blocks: blocks of the main optimizer.
        loss: loss as passed to backward.
        norm: global gradient norm, before clipping where the program clips.
        clip_limit: the last limit of the program's clipping, or None.
        rates: learning rate by step, a curve a parameter group.
        samples: largest norms, from stretches and sampled steps together.
        singles: norms of sampled single steps.
        updates: update-to-weight ratios of the sampled steps, shape [samples, tensors]; NaN where none.
        cosine: step and cosine with the step before, shape [2, pairs].
    """

    optimizers: tuple[OptimizerRecord, ...]
    names: tuple[str | None, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    last_step: int
    blocks: tuple[Block, ...]
    loss: Curve
    norm: Curve
    clip_limit: float | None
    rates: tuple[Curve, ...]
    samples: Samples
    singles: Samples
    updates: Floats
    cosine: Floats

    @property
    def by_backward(self) -> bool:
        """Whether steps are backwards, because no optimizer was seen."""
        return bool(self.optimizers) and self.optimizers[0].source == "backward"


def trace(journal: Journal, optimizers: Sequence[int]) -> Trace:
    """Read what `optimizers` (ids, the main one first) left in a journal; they share their step numbers."""
    main = optimizers[0] if optimizers else -1
    blocks = tuple(b for b in journal.blocks if b.o == main)
    parts = [_part(journal, o) for o in optimizers]
    names = tuple(name for part in parts for name in part.names)
    shapes = tuple(shape for part in parts for shape in part.shapes)
    rows = [r for r in journal.rows if r.o == main]
    ends = [b.last for b in blocks] + [r.n for r in rows] + [m.n for m in journal.maxima if m.o == main]
    if journal.end is not None:
        ends.append(journal.end.steps.get(main, 0))
    singles = _beside([part.singles for part in parts])
    norm, limit = _norm(blocks, singles, joined=len(parts) > 1)
    updates = (
        np.concatenate([_resampled(p.updates, p.singles, singles) for p in parts], axis=1)
        if parts
        else np.empty((0, 0))
    )
    return Trace(
        optimizers=tuple(journal.optimizers.get(o, OptimizerRecord(o)) for o in optimizers),
        names=names,
        shapes=shapes,
        last_step=max(ends, default=0),
        blocks=blocks,
        loss=Curve.of(
            (b.n + (b.c - 1) / 2, *_finite(b.loss or (math.nan, math.nan, math.nan)), float(b.c)) for b in blocks
        ),
        norm=norm,
        clip_limit=limit,
        rates=_rates(rows),
        samples=_beside([part.samples for part in parts]),
        singles=singles,
        updates=updates,
        cosine=np.array([(r.n, r.cos) for r in rows if r.cos is not None and math.isfinite(r.cos)]).reshape(-1, 2).T,
    )


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Mean host milliseconds of a step, by part.

    Attributes:
        step: the whole step; the parts add up to it.
        data: waiting for the data loader.
        forward: forward and everything else.
        backward: backward.
        update: the optimizer.
        median: median over the steps of the whole step.
    """

    step: float
    data: float
    forward: float
    backward: float
    update: float
    median: float

    @property
    def parts(self) -> tuple[tuple[str, str, float], ...]:
        """Class, label and milliseconds of each part, in the order of a step."""
        return (
            ("data", "data loader", self.data),
            ("forward", "forward and the rest", self.forward),
            ("backward", "backward", self.backward),
            ("update", "optimizer", self.update),
        )


def time_split(blocks: Sequence[Block]) -> TimeSplit | None:
    """Average the times of the blocks; the first three steps (warm-up) only count if there are no others."""
    timed = [b for b in blocks if b.step_ms > 0 and math.isfinite(b.step_ms)]
    timed = [b for b in timed if b.n > 3] or timed
    if not timed:
        return None
    weight = np.array([b.c for b in timed], dtype=np.float64)
    weight /= weight.sum()

    def mean(values: Iterable[float]) -> float:
        return float((np.nan_to_num(np.array(list(values)), posinf=0.0, neginf=0.0).clip(0) * weight).sum())

    backward, update, data = (
        mean(b.backward_ms for b in timed), mean(b.optimizer_ms for b in timed), mean(b.data_ms for b in timed)
    )  # fmt: skip
    step = max(mean(b.step_ms for b in timed), backward + update + data)
    order = np.argsort([b.step_ms for b in timed])
    middle = int(np.searchsorted(np.cumsum(weight[order]), 0.5))
    median = timed[int(order[min(middle, len(order) - 1)])].step_ms
    return TimeSplit(step, data, max(0.0, step - backward - update - data), backward, update, median)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    names: tuple[str | None, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    samples: Samples
    singles: Samples
    updates: Floats


def _part(journal: Journal, o: int) -> _Part:
    record = journal.optimizers.get(o, OptimizerRecord(o))
    rows = [r for r in journal.rows if r.o == o]
    maxima = [m for m in journal.maxima if m.o == o]
    wide = max([len(record.names), len(record.shapes), *(len(m.g) for m in maxima), *(len(r.g) for r in rows)])
    names = (*record.names, *(None,) * (wide - len(record.names)))
    shapes = (*record.shapes, *(None,) * (wide - len(record.shapes)))
    bad = _first_bad(journal, o)
    stretches = [(_begin(m, bad), m.last, m.g) for m in maxima] + [(r.n, r.n, r.g) for r in rows]
    stretches.sort(key=lambda s: (s[0], s[1]))
    return _Part(
        names=names,
        shapes=shapes,
        samples=_samples(stretches, wide),
        singles=_samples([(r.n, r.n, r.g) for r in rows], wide),
        updates=_matrix([r.u for r in rows], wide, math.nan),
    )


def _first_bad(journal: Journal, o: int) -> int:
    told = [e.n for e in journal.named("nonfinite") if e.o in (None, o) and e.n is not None]
    return min([*told, *(b.n for b in journal.blocks if b.o == o and b.bad and b.c == 1)], default=0)


def _begin(stretch: Maxima, bad: int) -> int:
    """Return where a stretch is drawn from: one that holds NaN begins no earlier than the first non-finite value."""
    if stretch.n < bad <= stretch.last and any(g is not None and math.isnan(g) for g in stretch.g):
        return bad
    return stretch.n


def _samples(stretches: Sequence[tuple[int, int, tuple[float | None, ...]]], wide: int) -> Samples:
    return Samples(
        np.array([s[0] for s in stretches], dtype=np.int64),
        np.array([s[1] for s in stretches], dtype=np.int64),
        _matrix([s[2] for s in stretches], wide, NO_GRADIENT),
    )


def _matrix(rows: Sequence[tuple[float | None, ...]], wide: int, nothing: float) -> Floats:
    table = np.full((len(rows), wide), nothing)
    for k, row in enumerate(rows):
        table[k, : len(row)] = [nothing if value is None else value for value in row[:wide]]
    table[np.isinf(table)] = math.nan
    return table


def _beside(parts: Sequence[Samples]) -> Samples:
    if not parts:
        return _samples([], 0)
    base = max(parts, key=lambda part: len(part.first))
    return Samples(base.first, base.last, np.concatenate([_resampled(p.values, p, base) for p in parts], axis=1))


def _resampled(values: Floats, source: Samples, target: Samples) -> Floats:
    if len(source.first) == len(target.first):
        return values
    if not len(source.first):
        return np.full((len(target.first), values.shape[1]), NO_GRADIENT)
    return values[np.maximum(0, np.searchsorted(source.first, target.first, side="right") - 1)]


def _norm(blocks: Sequence[Block], singles: Samples, *, joined: bool) -> tuple[Curve, float | None]:
    clips = [(b, b.clip) for b in blocks if b.clip is not None]
    if clips:
        points = [(b.n + (b.c - 1) / 2, clip.mean_norm, clip.mean_norm, clip.max_norm, b.c) for b, clip in clips]
        limits = [clip.limit for _, clip in clips if math.isfinite(clip.limit) and clip.limit > 0]
        return _positive(points), limits[-1] if limits else None
    measured = [(b, b.norm) for b in blocks if b.norm is not None]
    if measured and not joined:
        return _positive([(b.n + (b.c - 1) / 2, norm[0], norm[0], norm[1], b.c) for b, norm in measured]), None
    squares = np.where(singles.values == NO_GRADIENT, 0.0, np.minimum(singles.values, 1e150) ** 2)
    totals = np.sqrt(squares.sum(axis=1))
    return _positive(
        [(float(n), float(v), float(v), float(v), 1.0) for n, v in zip(singles.first, totals, strict=True)]
    ), None


def _positive(points: Iterable[tuple[float, float, float, float, float]]) -> Curve:
    def keep(value: float) -> float:
        return value if value > 0 and math.isfinite(value) else math.nan

    return Curve.of((x, keep(y), keep(low), keep(high), weight) for x, y, low, high, weight in points)


def _rates(rows: Sequence[Row]) -> tuple[Curve, ...]:
    groups = max((len(r.lr) for r in rows), default=0)
    curves: list[Curve] = []
    for k in range(min(groups, 8)):
        points = [(float(r.n), *_finite((r.lr[k], r.lr[k], r.lr[k])), 1.0) for r in rows if k < len(r.lr)]
        curve = Curve.of(points)
        if curve.seen and not any(len(c.y) == len(curve.y) and np.array_equal(c.y, curve.y) for c in curves):
            curves.append(curve)
    return tuple(curves)


def _finite(values: tuple[float, float, float]) -> tuple[float, float, float]:
    first, second, third = (max(-1e300, min(1e300, v)) if not math.isnan(v) else v for v in values)
    return first, second, third
