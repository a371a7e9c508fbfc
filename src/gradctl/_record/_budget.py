"""When to measure: pure functions of step numbers and seconds, so that a million steps can be simulated in a moment.

The budget is a share of the wall time since the first step; the fused norm and the sampled rows get half of it each.
Blocks, maxima and rows are spaced geometrically: any stretch of the run keeps the same relative resolution, and the
journal grows with the logarithm of the number of steps.
"""

from __future__ import annotations

import math

DENSE_ROWS = 5
"""The first steps are all sampled."""
MIN_ROW_GAP = 12
ROWS_A_DOUBLING = 64
BLOCKS_A_DOUBLING = 512
MAXIMA_A_DOUBLING = 96
MIN_MAXIMA_STEPS = 4
MIN_BLOCK_SECONDS = 0.005
"""Without this floor a model with steps of a third of a millisecond would write a line a step at first."""
MAX_NORM_GAP = 1000


def norm_gap(*, cost: float, step_seconds: float, budget: float, sharers: int = 1) -> int:
    """Return every how many steps the fused norm is measured: 1 if it fits half the budget, else as often as it does.

    Args:
        cost: seconds that one measurement takes.
        step_seconds: seconds between steps of this optimizer.
        budget: share of wall time for the whole recorder.
        sharers: optimizers that share the budget.
    """
    allowed = 0.5 * budget * step_seconds / max(1, sharers)
    if cost <= allowed:
        return 1
    return MAX_NORM_GAP if allowed <= 0.0 else min(MAX_NORM_GAP, math.ceil(cost / allowed))


def power_of_two(gap: int) -> int:
    """Return the smallest power of two that is at least `gap`."""
    return 1 << max(0, gap - 1).bit_length()


def next_row(
    step: int,
    *,
    paired: bool,
    cost: float,
    step_seconds: float,
    spent: float,
    elapsed: float,
    budget: float,
    aligned: bool = False,
    sharers: int = 1,
) -> int:
    """Return the next step to sample after `step` was sampled.

    Rows come in pairs of neighbours, so that the cosine between two gradients exists. `aligned` makes the choice a
    function of the step and a power of two alone: ranks with gaps of their own still share the steps of the larger.

    Args:
        step: the step just sampled; 1 is the first.
        paired: whether the step before was sampled too.
        cost: seconds that one row takes.
        step_seconds: seconds between steps.
        spent: seconds the recorder has spent so far, one-off work excluded.
        elapsed: seconds since the first step.
        budget: share of `elapsed` that may be spent.
        aligned: several ranks record.
        sharers: optimizers that share the budget.
    """
    if step < DENSE_ROWS or not paired:
        return step + 1
    gap = max(MIN_ROW_GAP, step // ROWS_A_DOUBLING)
    allowed = 0.5 * budget * step_seconds / max(1, sharers)
    if allowed > 0.0:
        gap = max(gap, math.ceil(2.0 * cost / allowed))
        if spent > budget * elapsed:
            debt_steps = (spent - budget * elapsed) / (budget * step_seconds)
            gap = max(gap, min(math.ceil(debt_steps), 4 * step))
    else:
        gap = 4 * step  # no budget, or a clock that stands still
    if not aligned:
        return step + gap
    gap = power_of_two(gap)
    # The pair is (k * gap, k * gap + 1): the first multiple that leaves the pair before it behind.
    return (step // gap + 1) * gap


def closes_block(*, steps: int, done: int, seconds: float) -> bool:
    """Whether a block of `steps` steps and `seconds` of run, the last of which is step `done`, is full."""
    return steps > done // BLOCKS_A_DOUBLING and (seconds >= MIN_BLOCK_SECONDS or done < 3)


def closes_maxima(*, steps: int, done: int) -> bool:
    """Whether a stretch of `steps` steps up to step `done` gets a line of largest norms."""
    return steps >= max(MIN_MAXIMA_STEPS, done // MAXIMA_A_DOUBLING)
