"""Tier 2: a row. One sampled step, with norms, update-to-weight ratios and the cosine with the step before.

Weights are sketched before and after the step, gradients before it; no full copy is made. What is computed on another
device stays there until the next drain reads it, so that a row never makes the program wait.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl._journal import JournalWriter, encode_norms
from gradctl._record import _quiet
from gradctl._record._gradients import exact_norm, local_part
from gradctl._record._norms import Reading
from gradctl._record._quiet import Quiet
from gradctl._record._sketch import Places, gather, sums
from gradctl._record._state import OptimizerState

_SMALL_WEIGHT = 1e-8
_STALLED_SHARE = 0.5


class _Group:
    """The sketches of the parameters on one device."""

    __slots__ = ("gradient", "indexes", "places", "seen", "weights")

    def __init__(self, indexes: list[int], places: list[Places], weights: Tensor) -> None:
        self.indexes = indexes
        self.places = places
        self.weights = weights
        self.gradient: Tensor | None = None
        self.seen: list[bool] = []


class Row:
    """A row in the making."""

    __slots__ = ("groups", "lr", "packs", "reading", "step", "time")

    def __init__(self, step: int) -> None:
        self.step = step
        self.time = 0.0
        self.groups: list[_Group] = []
        self.reading: Reading | None = None
        self.packs: list[tuple[_Group, bool, bool, Tensor]] = []
        self.lr: list[float] = []


class RowTier:
    """Samples rows and writes them.

    Args:
        journal: where rows are written.
    """

    def __init__(self, journal: JournalWriter) -> None:
        self._journal = journal
        self.waiting: list[tuple[OptimizerState, Row]] = []

    def sketch_weights(self, state: OptimizerState, params: Sequence[Tensor], step: int) -> None:
        """Remember a sketch of `params` as they are before step `step`."""
        with Quiet():
            row = state.row = Row(step)
            found: dict[torch.device, tuple[list[int], list[Places], list[Tensor]]] = {}
            for index, param in enumerate(params):
                local = local_part(param)
                if local is None or not local.numel():
                    continue
                places = state.places.get(index)
                if places is None or places.numel != local.numel() or places.strides != local.stride():
                    places = state.places[index] = Places(local)
                group = found.setdefault(local.device, ([], [], []))
                group[0].append(index)
                group[1].append(places)
                group[2].append(local)
            row.groups = [
                _Group(indexes, places, gather(places, tensors)) for indexes, places, tensors in found.values()
            ]

    def take_gradients(self, state: OptimizerState, reading: Reading) -> None:
        """Sketch the gradients of `reading` at the places where the weights were sketched."""
        row: Row = state.row
        row.reading = reading
        with Quiet():
            by_index = {reading.index(position): tensor for position, tensor in enumerate(reading.tensors)}
            for group in row.groups:
                parts: list[Tensor] = []
                group.seen = []
                for index, places in zip(group.indexes, group.places, strict=True):
                    grad = by_index.get(index)
                    dense = grad is not None and grad.dim() == len(places.sizes) and grad.numel() == places.numel
                    group.seen.append(dense)
                    if dense:
                        assert grad is not None
                        part = places.of(grad)
                        parts.append(part if part.dtype is torch.float32 else part.float())
                    else:
                        parts.append(group.weights.new_zeros(places.count))
                group.gradient = torch.cat(parts) if any(group.seen) else None

    def complete(self, state: OptimizerState, params: Sequence[Tensor], lr: list[float], time: float) -> None:
        """Compare with the weights after the step; write the row, or leave it for the drain if it is elsewhere."""
        row: Row = state.row
        state.row = None
        if row.reading is None:
            return
        row.time, row.lr = time, lr
        previous, state.previous = state.previous, None
        with Quiet():
            known: list[Tensor | None] = previous[1] if previous is not None and previous[0] == row.step - 1 else []
            neighbours = bool(known) and len(known) == len(row.groups)
            for number, group in enumerate(row.groups):
                tensors = [local_part(params[index]) for index in group.indexes if index < len(params)]
                if len(tensors) != len(group.indexes) or any(tensor is None for tensor in tensors):
                    continue
                before = known[number] if neighbours else None
                if before is not None and (group.gradient is None or before.numel() != group.gradient.numel()):
                    before = None
                low = any(state.low_precision[index] for index in group.indexes if index < len(state.low_precision))
                pack = _pack(group, gather(group.places, tensors), before, low)  # type: ignore[arg-type]
                row.packs.append((group, before is not None, low, pack))
            state.previous = (row.step, [group.gradient for group in row.groups])
            for group in row.groups:
                group.weights = group.gradient = None  # type: ignore[assignment]
            here = row.reading.values is not None and all(_quiet.is_here(pack) for *_, pack in row.packs)
        state.rows += 1
        # A row whose partner has been taken is no longer needed for a cosine.
        if neighbours and row.step > 5:
            state.previous = None
        if here:
            self.write(state, row)
        else:
            row.reading.tensors = []
            self.waiting.append((state, row))

    def write_waiting(self) -> None:
        """Write the rows that were left on other devices; waits for them."""
        waiting, self.waiting = self.waiting, []
        for state, row in waiting:
            self.write(state, row)

    def write(self, state: OptimizerState, row: Row) -> None:
        """Turn the numbers of `row` into a line."""
        with Quiet():
            self._write(state, row)

    def _write(self, state: OptimizerState, row: Row) -> None:
        reading = row.reading
        assert reading is not None
        norms: list[float | None] = [None] * state.num
        for index, value in _norm_values(reading):
            if index < state.num:
                norms[index] = value
        ratios: list[float | None] = [None] * state.num
        dot = own = other = zeros = elements = 0.0
        for group, neighbours, low, pack in row.packs:
            numbers: list[float] = pack.tolist()
            scale, columns = numbers[0], _columns(numbers[1:], len(group.indexes))
            nonzero = columns.pop(0)
            stuck = columns.pop(0) if low else []
            update, weight = columns[:2]
            for position, index in enumerate(group.indexes):
                if index >= state.num or index in reading.none:
                    continue
                weight_norm = math.sqrt(weight[position])
                places = group.places[position]
                share = places.numel / places.count
                if not weight_norm * math.sqrt(share) < _SMALL_WEIGHT:
                    ratios[index] = scale * math.sqrt(update[position]) / weight_norm
                if not group.seen[position]:
                    continue
                elements += places.numel
                zeros += share * (places.count - nonzero[position])
                if neighbours:
                    own += share * columns[2][position]
                    other += share * columns[3][position]
                    dot += share * columns[4][position]
                if low:
                    self._note_stall(state, index, row, stuck[position], nonzero[position])
        finite = [value for value in norms if value is not None]
        fields: dict[str, Any] = {
            "o": state.o,
            "n": row.step,
            "t": round(row.time, 4),
            "g": encode_norms(norms),
            "u": encode_norms(ratios),
            "tot": short(math.hypot(*finite)),
            "none": len(reading.none),
            "zero": sum(value == 0.0 for value in finite),
        }
        if elements:
            fields["dead"] = short(zeros / elements)
        if own > 0.0 and other > 0.0 and math.isfinite(dot + own + other):
            fields["cos"] = short(max(-1.0, min(1.0, dot / math.sqrt(own) / math.sqrt(other))))
        fields["lr"] = row.lr
        fields.update(peak_memory())
        self._journal.write("row", **fields)

    @staticmethod
    def _note_stall(state: OptimizerState, index: int, row: Row, stuck: float, moved_by: float) -> None:
        """Count rows in a row in which most updates of a 16-bit weight rounded to nothing."""
        if index >= len(state.low_precision) or not state.low_precision[index] or not any(row.lr) or moved_by == 0.0:
            return
        if stuck > _STALLED_SHARE * moved_by:
            state.stalls[index] = state.stalls.get(index, 0) + 1
            state.stall_share[index] = stuck / moved_by
        else:
            state.stalls.pop(index, None)


def _pack(group: _Group, after: Tensor, before: Tensor | None, low: bool) -> Tensor:
    """Return all numbers of one device as one vector: the scale of the updates, then columns of one number a tensor.

    Columns: update squared, weight squared, nonzero gradient elements; with a neighbour gradient squared, its gradient
    squared, their product; with 16-bit weights the elements whose gradient is not zero and that did not move. Updates
    and gradients are divided by their largest first, so that small squares do not vanish.
    """
    lengths = torch.tensor([places.count for places in group.places], device=after.device)
    gradient = group.gradient if group.gradient is not None else torch.zeros_like(group.weights)
    nonzero = gradient != 0
    update = after.sub_(group.weights)
    columns = [sums(nonzero.float(), lengths)]
    if low:
        columns.append(sums((nonzero & (update == 0)).float(), lengths))
    scale = _largest(update)
    columns.append(sums(update.div_(scale).square_(), lengths))
    columns.append(sums(group.weights.square_(), lengths))
    gradient.div_(_largest(gradient))
    if before is not None:
        columns += [sums(left * right, lengths) for left, right in ((gradient,) * 2, (before,) * 2, (gradient, before))]
    return torch.cat([scale.reshape(1), *columns])


def _largest(vector: Tensor) -> Tensor:
    """Return the largest magnitude in `vector`, at least the smallest normal number."""
    low, high = torch.aminmax(vector)
    return torch.maximum(-low, high).clamp_min(torch.finfo(vector.dtype).tiny)


def _columns(numbers: list[float], size: int) -> list[list[float]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _norm_values(reading: Reading) -> list[tuple[int, float]]:
    if reading.values is not None:
        found = [(reading.index(position), value) for position, value in enumerate(reading.values)]
        # Squares below the smallest float vanish: only what is exactly zero is called zero.
        return [
            (index, exact_norm(reading.tensors[position]) if value == 0.0 else value)
            for position, (index, value) in enumerate(found)
        ]
    found = []
    for where, vector in reading.norms:
        values: list[float] = vector.tolist()
        positions = range(len(values)) if where is None else where
        found += [(reading.index(position), value) for position, value in zip(positions, values, strict=True)]
    return found


def learning_rates(optimizer: Any) -> list[float]:
    """Return the learning rate of each group; 0 where there is none or where reading it would wait for a device."""
    rates: list[float] = []
    for group in optimizer.param_groups:
        rate = group.get("lr", 0.0)
        if isinstance(rate, Tensor):
            with Quiet():
                rate = rate.item() if rate.is_cpu and rate.numel() == 1 else 0.0
        rates.append(short(float(rate)) if isinstance(rate, int | float) else 0.0)
    return rates


def short(value: float, digits: int = 4) -> float:
    """Round to so many significant digits; NaN and inf stay what they are."""
    return float(f"{value:.{digits}g}")


def peak_memory() -> dict[str, float]:
    """Return peak resident memory, and peak allocated GPU memory if a GPU is in use, in MiB."""
    found: dict[str, float] = {}
    try:
        import resource
    except ImportError:  # not a Unix
        return found
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    if torch.cuda.is_initialized():
        found["cuda"] = max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())) >> 20
    return found
