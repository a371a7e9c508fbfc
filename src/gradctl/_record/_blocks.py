"""The drain: turns the flat list of stamps that the hooks extend into blocks, a line each once they are long enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradctl._journal import JournalWriter, encode_norms
from gradctl._record import _quiet
from gradctl._record._budget import closes_block, closes_maxima, norm_gap
from gradctl._record._rows import short
from gradctl._record._state import Block, Costs, OptimizerState

ATOMS = 5
"""Stamps are five atoms: code, thread, start, end, value. A code of 0 and more is an optimizer's step."""
DATA, CLIP, BACKWARD, GRAD = -1, -2, -3, -4

FLUSH_STEPS = 2048
FLUSH_SECONDS = 0.25
_TAILED = 32
"""More open blocks than this do not fit into the tail of a journal."""
EAGER_STEPS = 3
"""So many first steps are drained at once: a program that dies early leaves them."""


class Lane:
    """What happened in one thread since its last optimizer step, and in all."""

    __slots__ = (
        "backward",
        "begin",
        "clips",
        "consumers",
        "data",
        "fresh",
        "inner",
        "last_fresh",
        "last_losses",
        "losses",
        "optimizer",
        "optimizer_end",
        "steps",
    )

    def __init__(self) -> None:
        self.backward = self.data = self.optimizer = self.optimizer_end = 0.0
        self.begin: float | None = None
        self.fresh = self.last_fresh = self.steps = 0
        self.losses: list[Any] = []
        self.last_losses: list[Any] = []
        self.clips: list[tuple[float | None, float]] = []
        # Start of each backward, and the seconds of all before it: what part of a step with a closure is backward.
        self.inner: list[float] = []
        self.consumers: set[int] = set()


class Drain:
    """Empties the stamps.

    Args:
        stamps: the flat list that the hooks extend.
        by_number: states by their number in the journal.
        journal: where lines are written.
        costs: the budget and what was spent.
        on_accumulation: called with (state, first step of the new pattern, backwards a step).
        on_bad_loss: called with (state, step) for a loss that is only known now.
        fold: called with (state, step) before a block closes: what was measured up to there is to be known.
    """

    def __init__(
        self,
        stamps: list[Any],
        by_number: dict[int, OptimizerState],
        journal: JournalWriter,
        costs: Costs,
        on_accumulation: Callable[[OptimizerState, int, int], None],
        on_bad_loss: Callable[[OptimizerState, int], None],
        fold: Callable[[OptimizerState, int], None],
    ) -> None:
        self._stamps = stamps
        self._by_number = by_number
        self._journal = journal
        self._costs = costs
        self._on_accumulation = on_accumulation
        self._on_bad_loss = on_bad_loss
        self._fold = fold
        self._lanes: dict[int, Lane] = {}
        self.backwards = 0
        self.grads = 0
        self.live = 1

    def empty(self) -> None:
        """Book every stamp that has come so far."""
        stamps = self._stamps[: len(self._stamps) // ATOMS * ATOMS]
        del self._stamps[: len(stamps)]
        _fetch_values(stamps)
        lanes, by_number = self._lanes, self._by_number
        for start in range(0, len(stamps), ATOMS):
            code, thread, begin, end, value = stamps[start : start + ATOMS]
            lane = lanes.get(thread)
            if lane is None:
                lane = lanes[thread] = Lane()
            if code >= 0:
                self._step(by_number[code], lane, begin, end)
                continue
            if code == CLIP:
                lane.clips.append((begin, end))
                continue
            if lane.begin is None:
                lane.begin = begin
            if code == DATA:
                lane.data += end - begin
                continue
            lane.inner += (begin, lane.backward)
            lane.backward += end - begin
            if code == BACKWARD:
                self.backwards += 1
                lane.fresh += 1
                if value is not None:
                    lane.losses.append(value)
            else:
                self.grads += 1
            if len(lane.inner) > 4096:  # a thread that never steps
                lane.inner.clear()
                del lane.losses[:-16]

    def _step(self, state: OptimizerState, lane: Lane, begin: float, end: float) -> None:
        if not lane.fresh and len(self._lanes) > 1:
            self._adopt(lane)
        block = state.block
        if block is None:
            block = state.block = Block(state.done + 1)
        state.done += 1
        block.steps += 1
        lane.steps += 1
        consumers = lane.consumers
        if lane.fresh:
            lane.last_fresh, lane.fresh = lane.fresh, 0
            lane.last_losses, lane.losses = lane.losses, lane.last_losses
            lane.losses.clear()
            consumers.clear()
            consumers.add(state.o)
        elif state.o in consumers:
            lane.last_fresh = 0
            lane.last_losses.clear()
        else:
            # Two optimizers after one backward share what that backward was.
            consumers.add(state.o)
        for loss in lane.last_losses:
            if type(loss) is not float:
                self._on_bad_loss(state, state.done)
                loss = loss[0]
            if state.first_loss is None:
                state.first_loss = loss
            state.last_loss = loss
            if loss - loss != 0.0:
                block.bad += 1
                continue
            block.losses += 1
            block.sum_loss += loss
            if loss < block.lowest:
                block.lowest = loss
            if loss > block.highest:
                block.highest = loss
        block.microbatches += lane.last_fresh
        if lane.last_fresh == state.pattern:
            state.pattern_streak += 1
            if state.pattern_streak == 3:
                self._book_pattern(state)
        else:
            state.pattern, state.pattern_streak = lane.last_fresh, 1
        alone = end - (begin if begin > lane.optimizer_end else lane.optimizer_end)
        inner = lane.inner
        if inner and inner[-2] >= begin:
            first = next(place for place in range(0, len(inner), 2) if inner[place] >= begin)
            alone -= lane.backward - inner[first + 1]
        inner.clear()
        if alone > 0.0:
            lane.optimizer += alone
        lane.optimizer_end = end
        if lane.clips:
            for norm, limit in lane.clips:
                _book_clip(block, norm, limit)
            lane.clips.clear()
        since = state.last_end
        if since is None:
            since = lane.begin
        if since is not None:
            block.timed += 1
            block.seconds += end - since
            block.sum_backward += lane.backward - state.mark_backward
            block.sum_optimizer += lane.optimizer - state.mark_optimizer
            block.sum_data += lane.data - state.mark_data
        state.mark_backward, state.mark_optimizer, state.mark_data = lane.backward, lane.optimizer, lane.data
        state.last_end = end
        if closes_block(steps=block.steps, done=state.done, seconds=block.seconds):
            self.close(state, end)

    def _adopt(self, lane: Lane) -> None:
        """Backwards of threads that never step belong to a thread that steps and has none of its own."""
        for other in self._lanes.values():
            if other is lane or other.steps or not (other.fresh or other.data or other.clips):
                continue
            lane.backward += other.backward
            lane.data += other.data
            lane.fresh += other.fresh
            lane.losses += other.losses
            lane.clips += other.clips
            if lane.begin is None:
                lane.begin = other.begin
            other.backward = other.data = 0.0
            other.fresh, other.losses, other.clips = 0, [], []

    def _book_pattern(self, state: OptimizerState) -> None:
        if state.pattern not in (0, state.pattern_written):
            state.pattern_written = state.pattern
            self._on_accumulation(state, state.done - 2, state.pattern)

    def close(self, state: OptimizerState, end: float) -> None:
        """Write the block of `state` that is open, and its maxima when their stretch is long enough."""
        block, state.block = state.block, None
        if block is None:
            return
        costs = self._costs
        self._fold(state, block.begin + block.steps - 1)
        _take_totals(state, block)
        timed = max(1, block.timed)
        if block.timed:
            state.norm_gap = norm_gap(
                cost=state.norm_cost, step_seconds=block.seconds / timed, budget=costs.budget, sharers=self.live
            )
        self._journal.write("b", **self._fields(state, block, end))
        if state.peak is not None and closes_maxima(steps=state.done - state.last_maxima, done=state.done):
            self.close_maxima(state)

    def open_blocks(self) -> list[dict[str, Any]]:
        """Return the fields of the blocks that are not written yet, the longest first."""
        found = [(state, state.block) for state in self._by_number.values() if state.block is not None]
        found.sort(key=lambda entry: -entry[1].seconds)
        for state, block in found:
            _take_totals(state, block)
        return [self._fields(state, block, state.last_end or self._costs.began) for state, block in found[:_TAILED]]

    def _fields(self, state: OptimizerState, block: Block, end: float) -> dict[str, Any]:
        timed = max(1, block.timed)
        fields: dict[str, Any] = {
            "o": state.o,
            "n": block.begin,
            "c": block.steps,
            "t": round(end - self._costs.began, 3),
            "l": [short(block.sum_loss / block.losses), short(block.lowest), short(block.highest)]
            if block.losses
            else None,
            "bad": block.bad,
            "mb": block.microbatches,
            "ms": [
                round(1e3 * total / timed, 3)
                for total in (block.seconds, block.sum_backward, block.sum_optimizer, block.sum_data)
            ],
        }
        if block.calls:
            mean = block.sum_norm / block.norms if block.norms else 0.0
            fields["clip"] = [
                block.calls, block.clipped, short(block.worst_ratio), short(block.limit), short(mean),
                short(block.max_norm),
            ]  # fmt: skip
        if block.totals:
            fields["tot"] = [short(block.sum_total / block.totals), short(block.max_total)]
        return fields

    def close_maxima(self, state: OptimizerState) -> None:
        """Write the largest norms since the last such line."""
        if state.peak is None:
            return
        self._journal.write(
            "mx", o=state.o, n=state.last_maxima + 1, to=state.done, c=state.measured, g=encode_norms(state.peak)
        )
        state.peak, state.measured, state.last_maxima = None, 0, state.done

    def forget(self) -> None:
        """In a forked child: what the parent has seen is the parent's."""
        self._stamps.clear()
        self._lanes.clear()
        self.backwards = self.grads = 0


def _take_totals(state: OptimizerState, block: Block) -> None:
    """Book the global norms of the steps of `block`; those of later steps stay."""
    last = block.begin + block.steps - 1
    later: list[tuple[int, float]] = []
    for entry in state.totals:
        step, total = entry
        if step > last:
            later.append(entry)
        elif total - total == 0.0:
            block.totals += 1
            block.sum_total += total
            block.max_total = max(block.max_total, total)
    state.totals = later


def _book_clip(block: Block, norm: float | None, limit: float) -> None:
    block.calls += 1
    block.limit = limit
    if norm is None:
        return
    if norm > limit or norm != norm:
        block.clipped += 1
    if norm - norm == 0.0:
        block.norms += 1
        block.sum_norm += norm
        block.max_norm = max(block.max_norm, norm)
        if limit > 0.0:
            block.worst_ratio = max(block.worst_ratio, norm / limit)


def _fetch_values(stamps: list[Any]) -> None:
    """Read losses and clip norms that were left on another device: one transfer for each device."""
    places: list[tuple[int, Tensor, Any, bool]] = []
    for start in range(0, len(stamps), ATOMS):
        code = stamps[start]
        slot = start + 4 if code == BACKWARD else start + 2
        if code not in (BACKWARD, CLIP) or stamps[slot] is None or isinstance(stamps[slot], float):
            continue
        tensor, scale = stamps[slot]
        places.append((slot, tensor, scale, code == BACKWARD))
    if not places:
        return
    with _quiet.Quiet():
        by_device: dict[torch.device, list[tuple[int, Tensor, Any, bool]]] = {}
        for place in places:
            by_device.setdefault(place[1].device, []).append(place)
        for group in by_device.values():
            values = torch.stack([tensor.reshape(()).double() for _, tensor, _, _ in group]).tolist()
            for (slot, _, scale, is_loss), value in zip(group, values, strict=True):
                value = value / float(scale)
                # A loss that turns out bad only now is marked by a tuple, so that its event can be written.
                stamps[slot] = (value,) if is_loss and value - value != 0.0 else value
