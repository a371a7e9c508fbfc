"""A program without an optimizer: its outermost accumulating backwards are the steps.

That there is no optimizer is decided late, after a few backwards, and taken back as soon as one steps. Parameters are
the leaves that the graph reaches. The update by hand happens after the backward, so a row begun at one backward is
completed at the start of the next.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gradctl import _saved
from gradctl._record._blocks import ATOMS, BACKWARD
from gradctl._record._faults import Faults
from gradctl._record._gradients import exact_norm, local_part, stacked_norms
from gradctl._record._hot import Hot
from gradctl._record._norms import NormTier, book_norm_cost
from gradctl._record._quiet import Quiet, is_capturing
from gradctl._record._rows import RowTier
from gradctl._record._state import Costs, OptimizerState

DECIDE_AFTER = 3
DECIDE_AFTER_CREATED = 256
"""An optimizer that exists but has not stepped may be accumulating."""


class Stand:
    """What the stream needs of the recorder."""

    def __init__(
        self,
        *,
        hot: Hot,
        stamps: list[Any],
        clock: Callable[[], float],
        costs: Costs,
        norms: NormTier,
        rows: RowTier,
        new_state: Callable[[str], OptimizerState],
        describe: Callable[[OptimizerState, Sequence[Tensor]], None],
        optimizers_exist: Callable[[], bool],
        drain: Callable[[float], None],
        schedule_row: Callable[[OptimizerState, float, float], None],
        stop: Callable[[OptimizerState, int, Any], BaseException | None],
        every: bool,
        faults: Faults,
        older_exist: Callable[[set[int] | None], bool],
    ) -> None:
        self.older_exist = older_exist
        self.hot, self.stamps, self.clock, self.norms, self.rows = hot, stamps, clock, norms, rows
        self.costs, self.meter, self.every, self.faults = costs, costs.meter, every, faults
        self.new_state, self.describe, self.optimizers_exist = new_state, describe, optimizers_exist
        self.drain, self.schedule_row, self.stop = drain, schedule_row, stop


class BackwardStream:
    """Records backwards as steps while no optimizer steps."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self.state: OptimizerState | None = None
        self.over = False
        self._count = 0
        self._thread = threading.get_ident()
        self._early: dict[int, weakref.ref[Tensor]] = {}
        self._params: list[weakref.ref[Tensor]] = []
        self._norms: dict[int, float] = {}
        self._looks = 0
        self._lasting = False

    # -- through torch's engine ---------------------------------------------------------------------------------------

    def before_backward(self) -> None:
        """Complete a row that was begun at the backward before: the update has happened since."""
        state = self.state
        if state is not None and state.row is not None:
            begin = self._stand.meter()
            self._stand.rows.complete(state, self._present(), [], state.row.time)
            self._stand.schedule_row(state, state.row_cost + self._stand.meter() - begin, self._stand.clock())

    def after_backward(self, outputs: Any) -> BaseException | None:
        """Take one outermost accumulating backward as a step, once it is decided that these are the steps."""
        if self.over or (self._stand.hot.latest is not None and self._stand.hot.latest.source == "optimizer"):
            self.end()
            return None
        self._count += 1
        if self.state is None:
            has_optimizer = self._stand.optimizers_exist()
            wanted = DECIDE_AFTER_CREATED if has_optimizer else DECIDE_AFTER
            # Two looks tell parameters, which last, from inputs. Beside an optimizer, which mostly steps after one
            # backward, the first is not worth it.
            looks = not has_optimizer or self._count in (2, 3) or self._count >= wanted - 1
            bad = looks and self._peek(outputs)
            if self._count < wanted and (has_optimizer or not bad):
                return None
            if not has_optimizer and self._stand.older_exist(set(self._early)):
                return None
            self.decide()
        return self._step(outputs)

    def bad_loss(self) -> OptimizerState | None:
        """Return the state whose step the coming backward is, now that its loss is NaN or inf; None if it is unknown.

        Without an optimizer there is nothing to wait for any more: its steps are the backwards.
        """
        if self.over:
            return None
        stand = self._stand
        if self.state is None and not stand.optimizers_exist() and not stand.older_exist(None):
            self.decide(pending=0)
        if self.state is not None:
            self.state.next_norm = min(self.state.next_norm, self.state.steps)
        return self.state

    def params(self) -> list[Tensor]:
        """Return the parameters that are known and alive."""
        return self._present()

    def end(self) -> None:
        """An optimizer steps after all: these backwards are its."""
        self.over = True
        if self.state is not None:
            self.state.gone = True
            self.state.drop()

    def decide(self, *, pending: int = 1) -> None:
        """Take the backwards so far, and those to come, as steps.

        Args:
            pending: how many of the last ones get their stamp from the step that they are.
        """
        if self.state is not None or self.over:
            return
        stand = self._stand
        state = self.state = stand.new_state("backward")
        stamps = list(stand.stamps)
        stand.stamps.clear()
        for start in range(0, len(stamps), ATOMS):
            atoms = stamps[start : start + ATOMS]
            stand.stamps.extend(atoms)
            if atoms[0] == BACKWARD and state.steps < self._count - pending:
                state.steps += 1
                stand.stamps.extend((state.o, atoms[1], atoms[3], atoms[3], None))
        state.next_norm = state.next_row = state.steps

    def finish(self) -> None:
        """At the end of the program: what was too short to be decided is decided now."""
        if self.state is not None or not self._count or self.over:
            return
        self.decide(pending=0)
        state = self.state
        assert state is not None
        self._params = list(self._early.values())
        params = self._present()
        self._stand.describe(state, params)
        # They were looked at right after their backward; by now the program may have let go of the gradients.
        peak = [self._norms.get(id(param)) for param in params]
        state.never.clear()  # so few looks prove of no parameter that it is not reached
        if any(norm is not None for norm in peak):
            state.peak, state.measured = list(peak), self._looks

    def _peek(self, outputs: Any) -> bool:
        """Look at what a backward reached before it is decided what it is; return whether a gradient is NaN or inf."""
        begin = self._stand.meter()
        self._look_at_leaves(outputs)
        self._looks += 1
        bad = False
        if not is_capturing():
            with Quiet():
                for leaf in self._present():
                    grad = leaf.grad
                    local = None if grad is None else local_part(grad)
                    if local is None or not local.numel():
                        continue
                    norm = float(stacked_norms([local]))
                    if norm == 0.0 or norm - norm != 0.0:
                        norm = exact_norm(local)
                    bad = bad or norm != norm
                    old = self._norms.get(id(leaf), 0.0)
                    self._norms[id(leaf)] = norm if norm != norm or norm > old else old
        seconds = self._stand.meter() - begin
        self._stand.costs.spent += seconds
        self._stand.costs.one_off += seconds
        return bad

    def _look_at_leaves(self, outputs: Any) -> None:
        leaves = _saved.leaves([output for output in outputs if isinstance(output, Tensor)])
        found = {id(leaf): weakref.ref(leaf) for leaf in leaves}
        lasting = [
            reference
            for key, reference in found.items()
            if key in self._early and self._early[key]() is not None and self._early[key]() is reference()
        ]
        # Leaves of one backward only are inputs, unless the program makes new parameters in every step.
        self._lasting = bool(lasting)
        fresh = lasting or list(found.values())
        known = {id(reference()) for reference in self._params} if self._lasting else set[int]()
        if not self._lasting or not known:
            self._params = fresh
        else:
            self._params += [reference for reference in fresh if id(reference()) not in known]
        self._early.update(found)
        if len(self._early) > 100_000:
            self._early = found

    def _present(self) -> list[Tensor]:
        return [param for param in (reference() for reference in self._params) if param is not None]

    def _step(self, outputs: Any) -> BaseException | None:
        stand, state = self._stand, self.state
        assert state is not None
        stop = None
        number = state.steps + 1
        if state.steps >= state.next_row or state.steps >= state.next_norm:
            begin = stand.meter()
            samples = state.steps >= state.next_row
            if samples or not self._lasting:
                self._look_at_leaves(outputs)
            params = self._present()
            if len(params) != state.num or not state.described:
                stand.describe(state, params)
            with Quiet():
                reading = stand.norms.read(state, [param.grad for param in params], number)
            cost = stand.meter() - begin
            book_norm_cost(state, cost)
            if not samples:
                stand.costs.spent += cost
            state.next_norm = number if stand.every else state.steps + state.norm_gap
            if samples:
                stand.rows.sketch_weights(state, params, number)
                stand.rows.take_gradients(state, reading)
                state.row.time = stand.clock() - stand.costs.began
                state.row_cost = stand.meter() - begin
                state.next_row = number  # until it is completed
            stop = stand.stop(state, number, reading)
        now = stand.clock()
        state.steps = number
        stand.stamps.extend((state.o, threading.get_ident(), now, now, None))
        if number >= state.flush_at or now > state.flush_time:
            stand.drain(now)
        return stop

    # -- through RPC --------------------------------------------------------------------------------------------------

    def rpc_wrap(self, inner: Any) -> Any:
        """The wrap of `torch.distributed.autograd.backward`: its gradients live in a context, not in `.grad`."""

        def backward(context: Any, roots: Any, *args: Any, **kwargs: Any) -> Any:
            begin = self._stand.clock()
            result = inner(context, roots, *args, **kwargs)
            stop = None
            try:
                if "backward" not in self._stand.faults.off:
                    stop = self.rpc_step(context, roots, begin)
            except Exception as error:
                self._stand.faults.caught("backward", error)
            if stop is not None:
                raise stop
            return result

        return backward

    def rpc_step(self, context: Any, roots: Any, begin: float) -> BaseException | None:
        """Take one backward over RPC as a step of this process; return the error to raise, if that was asked for."""
        distributed_autograd: Any = importlib.import_module("torch.distributed.autograd")
        stand = self._stand
        state = self.state
        if state is None:
            state = self.state = stand.new_state("rpc")
        now = stand.clock()
        gradients: dict[Tensor, Tensor] = distributed_autograd.get_gradients(context)
        loss = reading = None
        with Quiet():
            if roots and roots[0].is_cpu and roots[0].numel() == 1:
                loss = float(roots[0])
            params = sorted(gradients, key=id)
            if [id(param) for param in params] != state.keys:
                stand.describe(state, params)
            if state.steps >= state.next_norm:
                reading = stand.norms.read(state, [gradients[param] for param in params], state.steps + 1)
                state.next_norm = state.steps + (1 if stand.every else state.norm_gap)
        state.steps += 1
        ident = threading.get_ident()
        stand.stamps.extend((BACKWARD, ident, begin, now, loss))
        stand.stamps.extend((state.o, ident, now, now, None))
        if state.steps >= state.flush_at or now > state.flush_time:
            stand.drain(now)
        return stand.stop(state, state.steps, reading)
