"""Where a loss goes: it falls, it blew up, it stays; said only where the noise allows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from gradctl._verdict._training import Training

WINDOWS = 10
FEWEST_STEPS = 5
STEPS_TO_CALL_IT_FLAT = 200
BLEW_UP = 100.0
HUGE = 1e150  # squares and sums of what is below can still be written


@dataclass(frozen=True)
class Trend:
    """What the loss did.

    Args:
        kind: `falls`, `blew_up`, `flat` (steady and not falling) or `unclear` (noisy, short, or rising a little).
        first: the first loss; where the journal has no end, the mean of the first block.
        last: the last loss, or the mean of the last block; nan when that was not finite.
        since: for `blew_up`: the step from which the loss was out of the range that it had at first.
    """

    kind: Literal["falls", "blew_up", "flat", "unclear"]
    first: float
    last: float
    since: int = 0


def trend(training: Training) -> Trend | None:
    """Judge the losses of `training`; None when no finite loss was seen."""
    finite = [(b.n, b.c, b.loss[0], b.loss[1], b.loss[2]) for b in training.losses if b.loss is not None]
    finite = [row for row in finite if all(math.isfinite(v) for v in row[2:])]
    if not finite:
        return None
    first = finite[0][2]
    last = finite[-1][2] if training.losses[-1].loss is not None else math.nan
    told = training.journal.end.losses.get(training.id) if training.journal.end else None
    if told:
        # exact where the recorder could say goodbye; a mean over a long block is not what the program printed last
        first = told[0] if told[0] is not None and math.isfinite(told[0]) else first
        last = last if told[1] is None else told[1] if math.isfinite(told[1]) else math.nan
    finite = [(n, c, _within(mean), _within(low), _within(high)) for n, c, mean, low, high in finite]
    since = _blew_up(finite)
    if since:
        return Trend("blew_up", first, last, since)
    steps = sum(c for _, c, *_ in finite)
    if _collapsed(finite, first, last):
        return Trend("falls", first, last)
    if steps < FEWEST_STEPS:
        return Trend("unclear", first, last)
    if len(finite) < FEWEST_STEPS:  # fast steps share a block from the start
        return Trend("falls" if _falls_in_few(finite) else "unclear", first, last)
    means, spread = _windows(finite)
    if _falls(means, spread):
        return Trend("falls", first, last)
    if steps >= STEPS_TO_CALL_IT_FLAT and _is_flat(finite, means, spread):
        return Trend("flat", first, last)
    return Trend("unclear", first, last)


def _collapsed(rows: list[tuple[int, int, float, float, float]], first: float, last: float) -> bool:
    """Whether a loss that is never negative fell by two decades and stays a decade down: no noise does that."""
    if not (first > 0 and 0 <= last <= 0.01 * first) or min(low for *_, low, _ in rows) < 0:
        return False
    return (
        max((mean for _, _, mean, _, _ in rows[-max(1, len(rows) // 4) :] if len(rows) > 1), default=0.0) < first / 10
    )


def _falls_in_few(rows: list[tuple[int, int, float, float, float]]) -> bool:
    """Whether block means fall from one to the next, by more than twice the range of the last three losses or more."""
    if len(rows) < 2 or any(b[2] >= a[2] for a, b in pairwise(rows)):
        return False
    tail = next((rows[-k:] for k in range(1, len(rows)) if sum(row[1] for row in rows[-k:]) >= 3), [])
    if not tail:
        return False
    low, high = min(row[3] for row in tail), max(row[4] for row in tail)
    return rows[0][2] - high > max(2 * (high - low), 0.02 * abs(rows[0][2]))


def _within(value: float) -> float:
    return max(-HUGE, min(HUGE, value))


def _windows(rows: list[tuple[int, int, float, float, float]]) -> tuple[list[float], float]:
    """Mean losses of up to ten stretches of blocks, and how uncertain such a mean is.

    Blocks grow with the run, so that the early stretches of a long run are short in steps: that is where a loss falls.
    """
    count = min(WINDOWS, len(rows))
    cuts = [len(rows) * i // count for i in range(count + 1)]
    stretches = [[row[2] for row in rows[a:b]] for a, b in pairwise(cuts)]
    spread = max(
        (_scatter(values) / math.sqrt(len(values)) for values in stretches[1:] if len(values) > 1), default=0.0
    )
    return [math.fsum(values) / len(values) for values in stretches], spread


def _scatter(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _falls(means: list[float], spread: float) -> bool:
    """Whether the last stretch is below the first by more than noise, and most pairs of stretches agree."""
    drop = means[0] - means[-1]
    if drop <= max(2 * spread, 0.005 * max(abs(means[0]), abs(means[-1]))):
        return False
    if drop > max(10 * spread, 0.02 * abs(means[0])) and max(means[1:]) < means[0]:
        return True  # it fell at once and rests since
    pairs = [(a, b) for i, a in enumerate(means) for b in means[i + 1 :]]
    return sum(b < a for a, b in pairs) >= 0.7 * len(pairs)


def _is_flat(rows: list[tuple[int, int, float, float, float]], means: list[float], spread: float) -> bool:
    """Whether a positive, quiet loss ended where it began, its very first steps included."""
    level = math.fsum(means) / len(means)
    if level <= 0 or min(means) <= 0:
        return False
    head = [row[2] for row in rows[:3]]
    quiet = max(*means, *head) - min(*means, *head) <= 0.05 * level and spread <= 0.02 * level
    return quiet and means[0] - means[-1] <= max(0.01 * level, 2 * spread)


def _blew_up(rows: list[tuple[int, int, float, float, float]]) -> int:
    """The step from which the loss stays beyond a hundred times its first range; 0 if it did not."""
    head = rows[: max(1, len(rows) // 10)]
    bound = BLEW_UP * max(1e-1, max(abs(v) for row in head for v in row[3:]))
    tail = rows[-max(1, len(rows) // 10) :]
    if min(mean for _, _, mean, _, _ in tail) <= bound:
        return 0
    since = 0
    for n, _, mean, _, _ in reversed(rows):
        if mean <= bound:
            break
        since = n
    return since
