"""How a gradient that is wrong differs from the derivative: a factor, transposed, swapped, a few elements, rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradctl._finite_difference._lowest import lower_operation
from gradctl._finite_difference._mismatch import Mismatch
from gradctl._finite_difference._point import Point, dot, size
from gradctl._finite_difference._slope import Steps, central

_PROBES = (501, 502, 503, 504)
_ELEMENTS = 8
_EVALUATIONS = 400
_ROUNDINGS = 4.0
_SAFETY = 8.0


def measured(
    point: Point, i: int, facts: Mismatch, step: float, steps: Steps, others: Sequence[int]
) -> Mismatch | None:
    """Return the facts with the first explanation that fits along fresh directions.

    Args:
        point: where.
        i: which tensor.
        facts: what is known so far.
        step: a step that gave a good answer.
        steps: which steps suit the dtype.
        others: tensors whose gradients it may have been given instead of its own.

    Returns:
        The facts, or None when fresh directions do not confirm that anything is wrong.
    """
    rows = [point.gradients(probe) for probe in _PROBES]
    point.release()
    found = [_slope(point, probe, i, step) for probe in _PROBES]
    own = [_expected(point, probe, i, row[i]) for probe, row in zip(_PROBES, rows, strict=True)]
    allowed = max(_SAFETY * facts.error, steps.quick * max(facts.size, abs(facts.numeric)))
    if not any(abs(a - b) > allowed for a, b in zip(own, found, strict=True)):
        return None
    if facts.is_none or facts.constant:
        return facts
    scale = max(map(abs, found))
    close = max(_SAFETY * facts.error / scale if scale > 0 else math.inf, 1e3 * steps.quick)
    rounded = _rounded(point, own, found, [_size(point, p, i, row[i]) for p, row in zip(_PROBES, rows, strict=True)])
    if rounded is not None:
        return replace(facts, rounded_to=rounded)

    def fits(change: Callable[[Tensor], Tensor], index: int = i) -> bool:
        given = [None if row[index] is None else change(row[index]) for row in rows]  # pyright: ignore[reportArgumentType]
        if any(g is None or g.shape != point.values[i].shape for g in given):
            return False
        return _distance([_expected(point, p, i, g) for p, g in zip(_PROBES, given, strict=True)], found) <= close

    factor = _factor(own, found)
    if factor is not None and _distance([factor * value for value in own], found) <= close:
        return replace(facts, factor=factor)
    if any(fits(change) for change in _transposes(point.values[i])):
        return replace(facts, transposed=True)
    if point.values[i].is_complex() and fits(torch.conj_physical):
        return replace(facts, conjugate=True)
    for j in others:
        if j != i and point.values[j].shape == point.values[i].shape and fits(lambda g: g, j):
            return replace(facts, swapped_with=point.subject.names[j])
    gradient = rows[0][i]
    return facts if gradient is None else replace(facts, elements=_elements(point, i, gradient, step, allowed))


def _slope(point: Point, probe: int, i: int, step: float) -> float:
    moves = {i: point.direction(probe, i)}
    return central(lambda t: point.change(probe, moves, t), step)


def _expected(point: Point, probe: int, i: int, gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(dot(gradient, point.direction(probe, i)))


def _size(point: Point, probe: int, i: int, gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(size(gradient, point.direction(probe, i)))


def _factor(own: Sequence[float], found: Sequence[float]) -> float | None:
    """Return the factor of least squares, or None for a gradient of zero."""
    square = sum(value * value for value in own)
    return sum(a * b for a, b in zip(own, found, strict=True)) / square if square > 0 else None


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    off = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    whole = math.sqrt(sum(y * y for y in b))
    return off / whole if whole > 0 else math.inf


def _transposes(value: Tensor) -> list[Callable[[Tensor], Tensor]]:
    if value.ndim < 2 or 1 in value.shape[-2:]:
        return []
    if value.shape[-1] == value.shape[-2]:
        return [lambda g: g.transpose(-1, -2)]
    # Of another shape the transposed gradient can only have come through a reshape.
    return [lambda g: g.reshape(*g.shape[:-2], g.shape[-1], g.shape[-2]).transpose(-1, -2)]


def _rounded(point: Point, own: Sequence[float], found: Sequence[float], sizes: Sequence[float]) -> str | None:
    """Name the dtype to which the backward rounds, when the difference is no larger than that."""
    off = max((abs(a - b) / n if n > 0 else math.inf) for a, b, n in zip(own, found, sizes, strict=True))
    if off > _ROUNDINGS * torch.finfo(torch.bfloat16).eps:
        return None
    lower = lower_operation(lambda: point.gradients(_PROBES[0]), point.values[0].dtype.to_real())
    point.release()
    if lower is not None and off <= _ROUNDINGS * torch.finfo(getattr(torch, lower[0])).eps:
        return lower[0]
    return None


def _elements(point: Point, i: int, gradient: Tensor, step: float, allowed: float) -> tuple[tuple[int, ...], ...]:
    """Halve the elements until single ones are left that are wrong; nothing when there are more than a few."""
    direction = point.direction(_PROBES[0], i)
    count, wrong, asked = direction.numel(), [], 0
    if count < 2:
        return ()
    waiting = [(0, count)]
    while waiting:
        low, high = waiting.pop()
        part = torch.zeros_like(direction).flatten()
        part[low:high] = direction.flatten()[low:high]
        part = part.view_as(direction)
        asked += 1
        off = central(lambda t, part=part: point.change(_PROBES[0], {i: part}, t), step) - float(dot(gradient, part))
        if abs(off) > allowed:
            if high - low == 1:
                wrong.append(low)
            else:
                waiting += [((low + high) // 2, high), (low, (low + high) // 2)]
        if len(wrong) > _ELEMENTS or asked > _EVALUATIONS:
            return ()
    if len(wrong) == count:
        return ()
    shape = tuple(direction.shape)
    return tuple(tuple(int(k) for k in torch.unravel_index(torch.tensor(flat), shape)) for flat in wrong)
