"""The slope of a function of one number at zero, by central differences over many steps, with an error bar for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Answer = Literal["agrees", "differs", "unknown"]

_NOISE_POINTS = 5
# Binomials of the fourth difference: the noise of one value is the difference over the root of their squares' sum, 70.
_FOURTH = (1.0, -4.0, 6.0, -4.0, 1.0)
_SAFETY = 8.0
_FINELY = 1e-2


@dataclass(frozen=True, slots=True)
class Steps:
    """Which steps suit a dtype; a step is relative to the root mean square of a tensor.

    Args:
        tried: the steps of the quick comparison; a shorter one where a longer one crosses a kink.
        small_gradients: a longer one, for tensors whose gradient is small beside the others.
        quick: a relative difference below which gradients agree without a closer look.
        ladder: from the longest to the shortest.
        noise: the spacing for the measurement of rounding noise.
        credible: a relative error below which a step's answer counts.
        jitter: how far beside the point a kink is told from a fault.
    """

    tried: tuple[float, ...]
    small_gradients: float
    quick: float
    ladder: tuple[float, ...]
    noise: float
    credible: float
    jitter: float


DOUBLE = Steps(
    tried=(1e-6, 1e-7, 1e-8),
    small_gradients=1e-3,
    quick=1e-8,
    ladder=tuple(10 ** (-2 - i / 2) for i in range(13)),
    noise=1e-8,
    credible=1e-7,
    jitter=1e-4,
)
SINGLE = Steps(
    tried=(1e-2, 3e-3),
    small_gradients=3e-2,
    quick=1e-3,
    ladder=tuple(10 ** (-1 - i / 4) for i in range(11)),
    noise=1e-4,
    credible=1e-2,
    jitter=3e-2,
)


@dataclass(frozen=True, slots=True)
class Slope:
    """One answer.

    Args:
        value: the slope.
        error: how far it may be off.
        step: the step that gave it.
    """

    value: float
    error: float
    step: float


@dataclass(frozen=True, slots=True)
class Ladder:
    """The answers of all steps, and what was seen on the way.

    Args:
        slopes: one for each step at which the function is finite, from the longest.
        noise: the rounding noise of one value.
        constant: the function did not move at all for the shortest steps.
    """

    slopes: tuple[Slope, ...]
    noise: float
    constant: bool

    @property
    def best(self) -> Slope | None:
        """The answer with the smallest error."""
        return min(self.slopes, key=lambda slope: slope.error, default=None)


def central(change: Callable[[float], float], step: float) -> float:
    """Return the central difference; `change` is the function less its value at zero."""
    return (change(step) - change(-step)) / (2 * step)


def climb(change: Callable[[float], float], steps: Steps, floor: float = 0.0) -> Ladder:
    """Take the central difference for every step of the ladder.

    The error of an answer is the larger of its distance to its neighbours, which shrinks with the square of the step
    until noise takes over, and of three times the noise over the step.

    Args:
        change: the function less its value at zero.
        steps: which steps.
        floor: noise that is known besides: the rounding of a lower dtype on the way.

    Source: the choice by the agreement of neighbouring steps is that of Ridders 1982 (without his extrapolation, which
    a kink would mislead); the noise from differences that a smooth function does not have is that of More and Wild
    2011, "Estimating computational noise".
    """
    pairs = [(step, change(step), change(-step)) for step in steps.ladder]
    finite = [(step, up, down) for step, up, down in pairs if math.isfinite(up) and math.isfinite(down)]
    noise = max(_noise(change, steps.noise), floor)
    values = [(up - down) / (2 * step) for step, up, down in finite]
    constant = len(finite) > 3 and all(up == 0.0 == down for _, up, down in finite[-4:])
    if constant and finite[0][1:] != (0.0, 0.0):
        # Short steps move nothing. If that is because the function rounds finely, long ones give its slope all the
        # same; those of a quantiser do not.
        quantum = min(abs(each) for _, *both in finite for each in both if each != 0.0)
        if 3 * quantum / finite[0][0] <= _FINELY * abs(values[0]):
            noise, constant = max(noise, quantum), False
    slopes: list[Slope] = []
    for i, (step, _, _) in enumerate(finite):
        near = [abs(values[i] - values[j]) for j in (i - 1, i + 1) if 0 <= j < len(values)]
        slopes.append(Slope(values[i], max(*near, 3 * noise / step) if near else math.inf, step))
    return Ladder(tuple(slopes), noise, constant)


def _noise(change: Callable[[float], float], spacing: float) -> float:
    half = _NOISE_POINTS // 2
    values = [0.0 if k == 0 else change(k * spacing) for k in range(-half, half + 1)]
    found = abs(sum(weight * value for weight, value in zip(_FOURTH, values, strict=True)))
    # One fourth difference may be small by chance; the values themselves are never known better than to their last bit.
    return max(found / math.sqrt(70), max(map(abs, values)) * 2.0**-52) if math.isfinite(found) else 0.0


def answer(expected: float, size: float, ladder: Ladder, steps: Steps) -> tuple[Answer, Slope | None]:
    """Say whether `expected` is the slope, and which step's answer says so.

    A step counts when its error is small beside the slope. The expectation differs only if it differs for each step
    that counts: a function that is straight piece by piece has a slope at each scale.

    Args:
        expected: the slope that the gradient gives.
        size: its expected size along a random direction.
        ladder: the answers.
        steps: which steps they belong to.
    """
    best = ladder.best
    if best is None:
        return "unknown", None

    def off(slope: Slope) -> bool:
        return abs(expected - slope.value) > _SAFETY * slope.error + steps.quick * size

    counting = [s for s in ladder.slopes if s.error <= steps.credible * max(size, abs(s.value))]
    if not counting:
        # No step is good. What is far outside even of the best error is wrong; what is inside is not known.
        return ("differs" if off(best) and best.error < 0.05 * abs(expected - best.value) else "unknown"), best
    if all(off(slope) for slope in counting):
        return "differs", min(counting, key=lambda slope: slope.error)
    return "agrees", best
