"""A step in which a norm or a row is due: what is measured before it and after it, and when that is due again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gradctl._errors import NonFiniteGradient
from gradctl._record._budget import next_row
from gradctl._record._events import Events, stopped
from gradctl._record._faults import Faults
from gradctl._record._gradients import parameters_of
from gradctl._record._norms import NormTier, Reading
from gradctl._record._quiet import is_capturing
from gradctl._record._rows import RowTier, learning_rates
from gradctl._record._state import NEVER, Costs, OptimizerState

_NONE_AT = 3


class Sampling:
    """Measures steps.

    Args:
        costs: the budget and what was spent.
        faults: where our own faults go.
        norms: tier 1.
        rows: tier 2.
        events: where parameters without a gradient are written.
        bind: called with (state, optimizer) when the optimizer has to be described.
        stops: raise at the first gradient that is NaN or inf.
        every: look at the gradients of each step, whatever that costs.
    """

    def __init__(
        self,
        costs: Costs,
        faults: Faults,
        norms: NormTier,
        rows: RowTier,
        events: Events,
        bind: Callable[[OptimizerState, Any], None],
        *,
        stops: bool,
        every: bool,
    ) -> None:
        self._costs = costs
        self._faults = faults
        self._norms = norms
        self._rows = rows
        self._events = events
        self._bind = bind
        self.stops = stops
        self.every = every
        self.aligned = False
        self.live = 1
        self.closures: dict[int, tuple[OptimizerState, Any]] = {}

    def before_step(self, state: OptimizerState, optimizer: Any, args: Any, kwargs: Any) -> NonFiniteGradient | None:
        """Measure before a step in which something is due; return the error to raise, if that was asked for."""
        if is_capturing():
            return None
        if not state.described or len(optimizer.param_groups) != state.num_groups:
            self._bind(state, optimizer)
        begin, spent = self._costs.meter(), self._costs.spent
        wants_row = state.steps >= state.next_row and "rows" not in self._faults.off
        if "norms" in self._faults.off:
            state.next_norm = NEVER
        if "rows" in self._faults.off:
            state.next_row = NEVER
        state.closure = (len(args) > 1 and callable(args[1])) or callable(kwargs.get("closure"))
        step = state.steps + 1
        state.row = None
        if wants_row:
            try:
                params = parameters_of(optimizer)
                if [id(param) for param in params] != state.keys:
                    self._bind(state, optimizer)
                self._rows.sketch_weights(state, params, step)
            except Exception as error:
                state.row = None
                self._faults.caught("rows", error)
        # With a closure the gradients of this step do not exist yet.
        state.sampling = wants_row or state.closure
        reading = None
        if not state.closure:
            reading = self.measure(state, optimizer, step)
        elif self.stops:
            # Its backwards are looked at as they end: after the step it would be too late.
            self.closures[threading.get_ident()] = state, optimizer
        if wants_row:
            state.row_cost = self._costs.meter() - begin - (self._costs.spent - spent)
        return self.stop_for(state, step, reading)

    def inside_closure(self) -> NonFiniteGradient | None:
        """After a backward: if it was that of a closure, look at its gradients before the update."""
        inside = self.closures.get(threading.get_ident())
        if inside is None:
            return None
        state, optimizer = inside
        return self.stop_for(state, state.steps + 1, self.measure(state, optimizer, state.steps + 1))

    def measure(self, state: OptimizerState, optimizer: Any, step: int) -> Reading | None:
        """Take the norms, and the sketches of a row that was begun."""
        if "norms" in self._faults.off:
            return None
        try:
            reading = self._norms.measure(state, optimizer, step)
        except Exception as error:
            self._faults.caught("norms", error)
            return None
        if self.every:
            state.next_norm = step
        if state.row is not None:
            try:
                self._rows.take_gradients(state, reading)
            except Exception as error:
                state.row = None
                self._faults.caught("rows", error)
        return reading

    def after_step(self, state: OptimizerState, optimizer: Any, now: float) -> None:
        """Measure after a step that was sampled or had a closure."""
        state.sampling = False
        begin, spent = self._costs.meter(), self._costs.spent
        if state.closure:
            self.closures.pop(threading.get_ident(), None)
            self.measure(state, optimizer, state.steps)
        if state.row is not None:
            try:
                self._rows.complete(state, parameters_of(optimizer), learning_rates(optimizer), now - self._costs.began)
                cost = self._costs.meter() - begin - (self._costs.spent - spent)
                self.schedule_row(state, state.row_cost + cost, now)
            except Exception as error:
                state.row = None
                self._faults.caught("rows", error)
        if state.steps == _NONE_AT:
            self._events.none(state)

    def schedule_row(self, state: OptimizerState, cost: float, now: float) -> None:
        """Book a row that took `cost` seconds and decide when the next one comes."""
        state.row_cost = cost
        costs = self._costs
        costs.spent += cost
        elapsed = max(costs.elapsed(now), 1e-9)
        following = next_row(
            state.steps,
            paired=state.row_measured_at == state.steps - 1,
            cost=cost,
            step_seconds=elapsed / max(1, state.steps),
            spent=costs.spent - costs.one_off,
            elapsed=elapsed,
            budget=costs.budget,
            aligned=self.aligned,
            sharers=self.live,
        )
        state.row_measured_at, state.next_row = state.steps, following - 1

    def stop_for(self, state: OptimizerState, step: int, reading: Reading | None) -> NonFiniteGradient | None:
        """Return the error that stops the program, if it asked for one and `reading` is a reason."""
        if self.stops and reading is not None and reading.bad:
            return stopped(state, step, reading.bad)
        return None
