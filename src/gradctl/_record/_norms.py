"""Tier 1: one fused norm over all gradients of an optimizer, in every step where that is cheap enough.

Its sum is the test for NaN and inf. On the CPU that is known at once, before the update; on another device the norms
stay there until the next drain, so that the step never waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradctl._record import _quiet
from gradctl._record._gradients import (
    are_plain,
    by_place,
    exact_norm,
    is_simple,
    local_part,
    parameters_of,
    stacked_norms,
)
from gradctl._record._state import Costs, OptimizerState

_no_function: Any = torch._C.DisableTorchFunction
_FLOAT_MAX = 3.4e38


class Reading:
    """The gradients of one step.

    `tensors` are plain and local, in the order of `indexes` (None: all parameters); `none` has no gradient; `norms` is
    a list of (positions in `tensors` | None for all, vector); `values` are the norms as floats if that needs no wait.
    """

    __slots__ = ("bad", "indexes", "none", "norms", "scaled", "tensors", "values")

    def __init__(self, tensors: list[Tensor], indexes: list[int] | None, none: list[int]) -> None:
        self.tensors = tensors
        self.indexes = indexes
        self.none = none
        self.norms: list[tuple[list[int] | None, Tensor]] = []
        self.values: list[float] | None = None
        self.bad: list[int] = []
        self.scaled = False

    def index(self, position: int) -> int:
        """Return which parameter `tensors[position]` belongs to."""
        return position if self.indexes is None else self.indexes[position]


OnBad = Callable[[OptimizerState, int, list[int], int], None]
"""Called with (state, step, parameters with NaN or inf, number of tensors)."""


class NormTier:
    """Measures the norms of all gradients of one optimizer.

    Args:
        costs: where the time is booked.
        on_bad: called when a gradient is NaN or inf, in the step it appears in.
        on_skip: called with (state, step, scale) when a fused scaler step will apply nothing.
        bind: called with (state, optimizer) when the optimizer has other parameters than it had.
    """

    def __init__(
        self,
        costs: Costs,
        on_bad: OnBad,
        on_skip: Callable[[OptimizerState, int, float | None], None],
        bind: Callable[[OptimizerState, Any], None],
    ) -> None:
        self._costs = costs
        self._bind = bind
        self._on_bad = on_bad
        self._on_skip = on_skip
        # One list of indexes for each pattern of missing gradients, so that equal patterns are stacked together.
        self._patterns: dict[tuple[int, ...], list[int]] = {}

    def measure(self, state: OptimizerState, optimizer: Any, step: int) -> Reading:
        """Take the norms of the gradients that `optimizer` holds now, as those of `step`."""
        meter = self._costs.meter
        begin = meter()
        # Two guards are cheap; modes of the program need them all.
        with _quiet.Quiet() if _quiet.dispatch_modes() else _no_function(), _quiet._inference(True):
            grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
            if len(grads) != state.num:
                self._bind(state, optimizer)
            reading = self.read(state, grads, step, optimizer)
        cost = meter() - begin
        book_norm_cost(state, cost)
        self._costs.spent += cost
        state.next_norm = step - 1 + state.norm_gap
        return reading

    def read(self, state: OptimizerState, grads: list[Any], step: int, optimizer: Any = None) -> Reading:
        """Take the norms of `grads` (None where there is none); to be called inside `Quiet` or its equal."""
        if state.fast and are_plain(grads):
            reading = Reading(grads, None, [])
            try:
                vector = stacked_norms(grads)
            except (RuntimeError, NotImplementedError):  # a layout that was not there before
                state.fast = False
                return self.read(state, grads, step, optimizer)
            reading.norms.append((None, vector))
        else:
            reading = self._read_slowly(state, grads)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            self._unscale(reading, getattr(optimizer, "grad_scale", None))
        self._keep(state, reading, step)
        if reading.scaled and reading.values is not None and not math.isfinite(math.hypot(*reading.values)):
            scale = getattr(optimizer, "grad_scale", None)
            self._on_skip(state, step, float(scale) if scale is not None else None)
        return reading

    def _read_slowly(self, state: OptimizerState, grads: list[Any]) -> Reading:
        with _quiet.Quiet():
            tensors: list[Tensor] = []
            indexes: list[int] = []
            none: list[int] = []
            for index, grad in enumerate(grads):
                if grad is None:
                    none.append(index)
                    continue
                state.never.discard(index)
                local = local_part(grad)
                if local is not None and local.numel():
                    tensors.append(local)
                    indexes.append(index)
            complete = len(tensors) == len(grads)
            state.fast = complete and are_plain(grads) and is_simple(tensors)
            pattern = None if complete else self._patterns.setdefault(tuple(indexes), indexes)
            if len(self._patterns) > 64:
                self._patterns.clear()
            reading = Reading(tensors, pattern, none)
            groups = by_place(tensors)
            for positions in groups:
                vector = stacked_norms([tensors[position] for position in positions])
                reading.norms.append((None if len(groups) == 1 else positions, vector))
        return reading

    def _unscale(self, reading: Reading, scale: Any) -> None:
        """A fused optimizer under a GradScaler gets scaled gradients and skips by itself."""
        reading.scaled = True
        if scale is not None:
            reading.norms = [(where, vector / scale.to(vector.device)) for where, vector in reading.norms]

    def _keep(self, state: OptimizerState, reading: Reading, step: int) -> None:
        if state.never and reading.indexes is None:
            state.never.clear()
        if not reading.norms:
            reading.values = []
            state.totals.append((step, 0.0))
            return
        where, vector = reading.norms[0]
        if len(reading.norms) == 1 and _quiet.is_here(vector):
            values: list[float] = vector.tolist()
            total = math.hypot(*values)
            if total - total != 0.0 and reading.scaled:
                reading.values = values  # the scaler will skip: nothing that the optimizer applies
                return
            if total - total != 0.0:
                vector, values = self._accuse(state, reading, vector, values, step)
                total = math.hypot(*values)
            reading.values = values
            state.samples.append((step, vector, reading.indexes))
            state.totals.append((step, total))
            if not reading.bad:
                state.bad_streak = 0
            return
        for where, vector in reading.norms:
            whose = reading.indexes
            if where is not None:
                whose = self._patterns.setdefault(tuple(map(reading.index, where)), [*map(reading.index, where)])
            state.samples.append((-step if reading.scaled else step, vector, whose))

    def _accuse(
        self, state: OptimizerState, reading: Reading, vector: Tensor, values: list[float], step: int
    ) -> tuple[Tensor, list[float]]:
        """Tell NaN and inf from a norm that only overflowed; correct the latter."""
        for position, value in enumerate(values):
            if value - value == 0.0:
                continue
            exact = math.nan if value != value else exact_norm(reading.tensors[position])
            if exact - exact != 0.0:
                reading.bad.append(reading.index(position))
            values[position] = exact
        if reading.bad:
            self._on_bad(state, step, reading.bad, len(reading.tensors))
            state.bad_streak += 1
        return torch.tensor([min(value, _FLOAT_MAX) for value in values], dtype=torch.float64), values

    def fold(self, state: OptimizerState, upto: int, gradient_of: Callable[[int], Any]) -> None:
        """Fold what was measured up to step `upto` into the running maxima; waits for other devices.

        Args:
            state: the optimizer.
            upto: the last step that counts.
            gradient_of: returns the present gradient of a parameter, to tell inf from a norm that overflowed.
        """
        samples = [sample for sample in state.samples if abs(sample[0]) <= upto]
        if not samples:
            return
        state.samples = state.samples[len(samples) :]
        state.measured += len({sample[0] for sample in samples})
        with _quiet.Quiet():
            groups: dict[tuple[int, torch.device], list[Any]] = {}
            for sample in samples:
                groups.setdefault((id(sample[2]), sample[1].device), []).append(sample)
            remote: dict[int, list[float]] = {}
            for group in groups.values():
                indexes: list[int] | None = group[0][2]
                table = torch.stack([vector.double() for _, vector, _ in group])
                peaks: list[float] = table.amax(0).tolist()
                if not _quiet.is_here(table):
                    for (step, _, _), row in zip(group, table.tolist(), strict=True):
                        self._judge_late(state, step, row, indexes, gradient_of)
                        remote.setdefault(abs(step), []).extend(row)
                self._merge(state, peaks, indexes)
            for step in sorted(remote):
                state.totals.append((step, math.hypot(*remote[step])))

    def _judge_late(
        self,
        state: OptimizerState,
        step: int,
        row: list[float],
        indexes: list[int] | None,
        gradient_of: Callable[[int], Any],
    ) -> None:
        suspects = [position for position, value in enumerate(row) if value - value != 0.0]
        if not suspects:
            return
        if step < 0:
            self._on_skip(state, -step, None)
            return
        bad: list[int] = []
        for position in suspects:
            index = position if indexes is None else indexes[position]
            if row[position] == row[position]:
                now = gradient_of(index)
                local = None if now is None else local_part(now)
                if local is None or bool(torch.isfinite(local).all()):
                    continue
            bad.append(index)
        if bad:
            self._on_bad(state, step, bad, len(row))
            state.bad_streak += 1

    @staticmethod
    def _merge(state: OptimizerState, peaks: list[float], indexes: list[int] | None) -> None:
        merged = state.peak
        if merged is None or len(merged) != state.num:
            unseen: list[float | None] = [None] * state.num
            merged = state.peak = unseen
        for position, value in enumerate(peaks):
            index = position if indexes is None else indexes[position]
            if index >= len(merged):
                return
            old = merged[index]
            # A value that is not finite stays: it is the fact of the stretch.
            if old is None or value > old or value != value:
                merged[index] = value


def book_norm_cost(state: OptimizerState, cost: float) -> None:
    """Follow what a norm costs: down at once, up slowly, since a busy machine and the first call only ever add."""
    old = state.norm_cost
    state.norm_cost = cost if old == 0.0 else 0.5 * (old + cost) if cost < old else 0.9 * old + 0.1 * cost


def gradient_getter(optimizer: Any) -> Callable[[int], Any]:
    """Return a function from the index of a parameter to its present gradient."""

    def gradient_of(index: int) -> Any:
        params = parameters_of(optimizer) if optimizer is not None else []
        return params[index].grad if index < len(params) else None

    return gradient_of
