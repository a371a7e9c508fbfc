"""Compare the gradients of a subject with finite differences, and find the tensors for which they disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from gradctl._errors import UsageError
from gradctl._finite_difference._causes import measured
from gradctl._finite_difference._lowest import lower_operation
from gradctl._finite_difference._mismatch import Comparison, Mismatch
from gradctl._finite_difference._point import Point, Subject, difference, dot, size
from gradctl._finite_difference._slope import DOUBLE, SINGLE, Answer, Ladder, Slope, Steps, answer, central, climb
from gradctl._finite_difference._state import RandomStates

# Gradients of one group lie within this of the largest: in a group with larger ones a small one would not be seen.
_SPREAD = 1e-3
# Below this share of all gradients a tensor's own cannot be told from rounding (a bias before BatchNorm).
_NOTHING = 1e-11
# Two runs that differ by less are one sum in another order, not a wrong one.
REORDERED = 1e-10
# Rounding errors of one value of a function, in units of its last place.
_ROUNDINGS = 16.0
# A step whose rounding hides a larger share of the gradients than this is left to the closer look.
_TOO_NOISY = 1e-4
# An answer that is known no better than this, as a share of the gradient, leaves the comparison undecided.
_ROUGHLY = 1e-3
_BESIDE = 2


class RoundsToSingle(Exception):
    """The forward casts to float32; never shown: it ends a comparison that another one replaces."""


def compare(
    subject: Subject,
    *,
    probes: int = 3,
    seed: int = 0,
    order: int = 1,
    rounding: Literal["compare", "raise"] = "compare",
) -> Comparison:
    """Compare gradients with central differences along random directions, group by group, then find the culprits.

    Every tensor is moved at once, those with much smaller gradients in a group of their own; a group that disagrees is
    halved until single tensors are left. What disagrees is looked at over a ladder of steps, along a second set of
    directions, and beside the point, where a kink is gone and a fault is not.

    Args:
        subject: what is compared; its dtypes decide about the steps.
        probes: how many directions, each with a cotangent of its own.
        seed: of both.
        order: 2 compares the gradient of the gradient.
        rounding: whether to end as soon as something disagrees in a function that casts to float32 on the way.

    Raises:
        RoundsToSingle: with `rounding="raise"`.
        UsageError: there is no floating output, or an output is not finite at the point.
    """
    with RandomStates(subject.generators) as states:
        whole = twice(subject, states, seed, rounding) if order == 2 else subject
        return _Search(whole, states, probes, seed, rounding).run()


def twice(subject: Subject, states: RandomStates, seed: int, rounding: str = "compare") -> Subject:
    """Return the subject whose outputs are the gradients of this one, cotangents being inputs as well."""
    point = Point(subject, states, seed)
    if rounding == "raise" and _single(point.outputs) and not _single(subject.values):
        raise RoundsToSingle
    _refuse_what_cannot_be_compared(point)
    chosen, cotangents = point.chosen, point.cotangents(0)
    point.release()
    count = len(subject.values)

    def run(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = subject.run(leaves[:count])
        pairs = [(outputs[i], u) for i, u in zip(chosen, leaves[count:], strict=True) if outputs[i].requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in leaves[:count]]
        found: Any = torch.autograd.grad(
            [out for out, _ in pairs],
            list(leaves[:count]),
            [u for _, u in pairs],
            create_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(leaf) if g is None else g.to_dense() if g.layout != torch.strided else g
            for g, leaf in zip(found, leaves[:count], strict=True)
        ]

    return replace(
        subject,
        run=run,
        names=(*subject.names, *(f"grad_outputs[{k}]" for k in range(len(cotangents)))),
        values=(*subject.values, *cotangents),
        every_output=True,
        still={},
    )


def _refuse_what_cannot_be_compared(point: Point) -> None:
    if not point.outputs:
        raise UsageError(
            "the function returns no floating tensor",
            why="only floating and complex outputs have a derivative",
            fix="return the tensors themselves, not numbers or integer tensors",
        )
    if not point.finite:
        raise UsageError(
            "an output is NaN or infinite at this point",
            why="differences of it say nothing about its derivative",
            fix="check at inputs for which the outputs are finite",
        )


class _Search:
    """One comparison, from the first forward to the facts about each culprit."""

    def __init__(self, subject: Subject, states: RandomStates, probes: int, seed: int, rounding: str) -> None:
        self.rounding = rounding
        self.subject, self.states, self.probes, self.seed = subject, states, probes, seed
        single = _single(subject.values)
        self.steps: Steps = SINGLE if single else DOUBLE
        self.point = Point(subject, states, seed)
        _refuse_what_cannot_be_compared(self.point)
        if rounding == "raise" and not single and _single(self.point.outputs):
            raise RoundsToSingle
        self.beside: list[Point] | None = None
        self.lowest: tuple[str, str] | None = None
        self.looked_lower = False
        self.floor = 0.0
        self.undecided: dict[str, float] = {}
        self.eps = 2.0**-23 if single else 2.0**-52
        self.start = 0
        self.again: float | None = None
        self.magnitudes: dict[int, float] = {}
        self.unknown: dict[int, tuple[int, Slope | None, float]] = {}

    def run(self) -> Comparison:
        point = self.point
        count = len(self.subject.values)
        first = point.gradients(0)
        second = point.same_graph_again(0)
        repeat = [0.0 if a is None or b is None else difference(a, b) for a, b in zip(first, second, strict=True)]
        self.none = [g is None for g in first]
        self.expected: list[list[float]] = []
        self.sizes: list[list[float]] = []
        for probe in range(self.probes):
            self._measure(probe, first if probe == 0 else self._gradients(probe, first))
        # No direction has an element of zero, so that what is not finite shows in the slope.
        self.nonfinite = [
            int((~torch.isfinite(g)).sum()) if g is not None and not math.isfinite(self.expected[0][i]) else 0
            for i, g in enumerate(first)
        ]
        point.release()
        kept = [i for i in range(count) if not self.nonfinite[i] and repeat[i] <= REORDERED]
        largest = [max(self.sizes[k][i] for k in range(self.probes)) for i in range(count)]
        self.total = math.sqrt(sum(largest[i] ** 2 for i in kept)) or 1.0
        suspects: dict[int, int] = {}
        for group in _groups(kept, largest, self.total):
            small = largest[group[0]] <= _SPREAD * self.total
            # Without a gradient all is expected to stand still, which one direction shows as well as three.
            nothing = largest[group[0]] <= _NOTHING * self.total
            for probe in range(1 if nothing else self.probes):
                left = [i for i in group if i not in suspects]
                if left and not self._quick(probe, left, small=small):
                    if self._forward_differs():
                        return self._comparison(forward_repeat=self.again)
                    suspects |= dict.fromkeys(self._culprits(probe, left), probe)
        mismatches, kinks = self._explained(suspects, kept)
        for i in range(count):
            if repeat[i] > REORDERED:
                mismatches.append(self._plain(i, math.nan, math.nan, repeat=repeat[i]))
            elif self.nonfinite[i]:
                mismatches.append(self._not_finite(i))
        order = {name: i for i, name in enumerate(self.subject.names)}
        return self._comparison(
            mismatches=tuple(sorted(mismatches, key=lambda m: order[m.name])),
            kinks=tuple(sorted(kinks, key=lambda m: order[m.name])),
            forward_repeat=self.again or 0.0,
        )

    def _comparison(self, **facts: object) -> Comparison:
        points = [self.point, *(self.beside or [])]
        found = Comparison(
            undecided=self.undecided,
            precision="float32" if self.steps is SINGLE else "float64",
            lowest=self.lowest,
            num_forwards=sum(point.num_forwards for point in points),
            num_backwards=sum(point.num_backwards for point in points),
            checked=self.subject.names,
        )
        return replace(found, **facts)  # pyright: ignore[reportArgumentType]

    def _forward_differs(self) -> bool:
        """Say whether two forwards differ by more than an order of sums: asked once, when something does not agree."""
        if self.again is None:
            self.again = self.point.forward_repeat()
            self.floor = self.again * self._magnitude(0) if math.isfinite(self.again) else 0.0
        return self.again > REORDERED

    # -- what the gradients say ---------------------------------------------------------------------------------------

    def _gradients(self, probe: int, first: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return the gradients of another probe; of one number they are the same for all probes."""
        one = len(self.point.outputs) == 1 and self.point.outputs[0].numel() == 1
        return first if one and not self.point.outputs[0].is_complex() else self.point.gradients(probe)

    def _measure(self, probe: int, gradients: list[torch.Tensor | None]) -> None:
        slopes, sizes = [], []
        for i, gradient in enumerate(gradients):
            if gradient is None:
                slopes.append(torch.zeros((), dtype=torch.float64))
                sizes.append(torch.zeros((), dtype=torch.float64))
            else:
                direction = self.point.direction(probe, i)
                slopes.append(dot(gradient, direction))
                sizes.append(size(gradient, direction))
        self.expected.append(torch.stack(slopes).tolist())
        self.sizes.append(torch.stack(sizes).tolist())

    def _magnitude(self, probe: int) -> float:
        """Return the norm of the terms that are added to one number: what rounding is relative to."""
        if probe not in self.magnitudes:
            pairs = zip(self.point.outputs, self.point.cotangents(probe), strict=True)
            self.magnitudes[probe] = math.sqrt(sum(float(size(out, u)) ** 2 for out, u in pairs))
        return self.magnitudes[probe]

    # -- what differences say -----------------------------------------------------------------------------------------

    def _quick(self, probe: int, group: Sequence[int], *, small: bool = False) -> bool:
        """Say whether the gradients of a group agree at one of a few steps, which is nearly always so."""
        moves = {i: self.point.direction(probe, i) for i in group}
        expected = sum(self.expected[probe][i] for i in group)
        whole = _norm(self.sizes[probe][i] for i in group)
        allowed = self.steps.quick * whole + _NOTHING * self.total
        rounding = _ROUNDINGS * self.eps * self._magnitude(probe)
        shorter = self.steps.tried[self.start :]
        for number, step in enumerate((self.steps.small_gradients, *shorter) if small else shorter):
            noise = 0.0 if small and number == 0 else rounding / step
            if noise > max(_TOO_NOISY, self.steps.quick) * whole:
                break
            found = central(lambda t, step=step: self.point.change(probe, moves, t), step)
            if abs(found - expected) <= allowed + noise:
                # Where one direction crosses kinks at a longer step, others do as well.
                self.start += 0 if small else number
                return True
        return False

    def _ladder(self, point: Point, probe: int, group: Sequence[int]) -> Ladder:
        self._look_lower()
        moves = {i: point.direction(probe, i) for i in group}
        floor = max(self.floor, self.eps * self._magnitude(probe))
        return climb(lambda t: point.change(probe, moves, t), self.steps, floor)

    def _look_lower(self) -> None:
        """Find out once whether the forward rounds to a lower dtype: its differences are as coarse as that."""
        if self.looked_lower:
            return
        self.looked_lower = True
        than = torch.float32 if self.steps is SINGLE else torch.float64
        self.lowest = lower_operation(lambda: self.point.change(0, {}, 0.0), than)
        if self.lowest is not None:
            if self.lowest[0] == "float32" and self.rounding == "raise":
                raise RoundsToSingle
            eps = torch.finfo(getattr(torch, self.lowest[0])).eps
            self.floor = max(self.floor, eps * self._magnitude(0) / 4)

    def _answer(self, probe: int, group: Sequence[int]) -> tuple[Answer, Slope | None, Ladder]:
        ladder = self._ladder(self.point, probe, group)
        expected = sum(self.expected[probe][i] for i in group)
        given, slope = answer(expected, _norm(self.sizes[probe][i] for i in group), ladder, self.steps)
        if given == "unknown" and slope is not None and slope.error <= self.steps.credible * self.total:
            given = "agrees"  # nothing, as far as can be seen beside the other gradients
        return given, slope, ladder

    def _culprits(self, probe: int, group: Sequence[int]) -> list[int]:
        """Halve a group that disagrees until single tensors are left that do."""
        given, slope, _ = self._answer(probe, group)
        if given == "unknown":
            expected = sum(self.expected[probe][i] for i in group)
            whole = max(_norm(self.sizes[probe][i] for i in group), abs(expected), abs(slope.value) if slope else 0.0)
            known = slope.error / whole if slope and whole else math.inf
            self.unknown |= dict.fromkeys(group, (probe, slope, known))
        if given != "differs":
            return []
        if len(group) == 1:
            return list(group)
        half = len(group) // 2
        found = [
            i
            for part in (group[:half], group[half:])
            if not self._quick(probe, part)
            for i in self._culprits(probe, part)
        ]
        if found:
            return found
        return [i for i in group if self._answer(probe, [i])[0] == "differs"]

    # -- what is said about the culprits ------------------------------------------------------------------------------

    def _explained(self, suspects: dict[int, int], kept: Sequence[int]) -> tuple[list[Mismatch], list[Mismatch]]:
        mismatches: list[Mismatch] = []
        kinks: list[Mismatch] = []
        for i, probe in suspects.items():
            given, slope, ladder = self._answer(probe, [i])
            if given != "differs" or slope is None:
                continue
            facts = self._plain(i, self.expected[probe][i], slope.value, error=slope.error, size=self.sizes[probe][i])
            if self._agrees_beside(i, probe, facts.relative):
                kinks.append(facts)
                continue
            facts = replace(facts, constant=ladder.constant and self.lowest is None)
            full = measured(self.point, i, facts, slope.step, self.steps, kept)
            if full is not None:
                mismatches.append(full)
        for i, (probe, slope, known) in self.unknown.items():
            if i in suspects:
                continue
            if self._agrees_beside(i, probe, math.inf):
                value, error = (slope.value, slope.error) if slope else (math.nan, math.inf)
                kinks.append(self._plain(i, self.expected[probe][i], value, error=error))
            elif known > _ROUGHLY:
                self.undecided[self.subject.names[i]] = known
        return mismatches, kinks

    def _plain(
        self, i: int, analytic: float, numeric: float, *, error: float = 0.0, size: float = 0.0, repeat: float = 0.0
    ) -> Mismatch:
        return Mismatch(
            name=self.subject.names[i],
            shape=tuple(self.subject.values[i].shape),
            analytic=analytic,
            numeric=numeric,
            error=error,
            size=size,
            is_none=self.none[i],
            repeat=repeat,
            hooks=self.subject.hooks.get(i, 0),
        )

    def _not_finite(self, i: int) -> Mismatch:
        ladder = self._ladder(self.point, 0, [i])
        best = ladder.best
        good = best is not None and best.error <= 1e-3 * abs(best.value) + self.steps.credible * self.total
        numeric = best.value if best is not None and good else math.nan
        return replace(self._plain(i, math.nan, numeric), nonfinite=self.nonfinite[i])

    def _agrees_beside(self, i: int, probe: int, relative: float) -> bool:
        """Say whether the gradient of one tensor is right at points beside this one: there was a kink, and no fault.

        Args:
            i: which tensor.
            probe: the direction in which it was wrong.
            relative: by how much; what is left of it beside the point is no agreement.
        """
        answers = [self._answer_at(point, i, probe, relative) for point in self._points_beside()]
        return "agrees" in answers and "differs" not in answers

    def _answer_at(self, point: Point, i: int, probe: int, relative: float) -> Answer:
        gradient = point.gradients(probe)[i]
        point.release()
        direction = point.direction(probe, i)
        expected = 0.0 if gradient is None else float(dot(gradient, direction))
        norm = 0.0 if gradient is None else float(size(gradient, direction))
        if not (math.isfinite(expected) and math.isfinite(norm)):
            return "unknown"
        given, slope = answer(expected, norm, self._ladder(point, probe, [i]), self.steps)
        if given == "agrees" and slope is not None:
            left = abs(expected - slope.value) / max(norm, abs(slope.value), 1e-300)
            return "agrees" if left <= 0.1 * relative else "differs"
        return given

    def _points_beside(self) -> list[Point]:
        if self.beside is None:
            self.beside = []
            for number in range(_BESIDE):
                try:
                    values = self.point.beside(number, self.steps.jitter)
                    point = Point(self.subject, self.states, self.seed, values)
                except (ValueError, RuntimeError, ArithmeticError):
                    continue  # outside of where the function is defined
                if point.finite:
                    self.beside.append(point)
        return self.beside


def _single(tensors: Sequence[torch.Tensor]) -> bool:
    return any(torch.finfo(tensor.dtype).eps > 1e-10 for tensor in tensors)


def _groups(kept: Sequence[int], largest: Sequence[float], total: float) -> list[list[int]]:
    """Sort tensors into groups of like gradients, the largest first; the last is of those that are zero."""
    groups: list[list[int]] = []
    nothing = [i for i in kept if largest[i] <= _NOTHING * total]
    for i in sorted((i for i in kept if largest[i] > _NOTHING * total), key=lambda i: -largest[i]):
        if groups and largest[i] > _SPREAD * largest[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [*groups, *([nothing] if nothing else [])]


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))
