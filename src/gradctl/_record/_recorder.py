"""The recorder of one process: wires taps, tiers and journal together, and takes everything back at the end."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradctl import _taps
from gradctl._journal import EVENTS_KEPT, JournalWriter
from gradctl._names import NameBook
from gradctl._record import _events, _hot
from gradctl._record._blocks import EAGER_STEPS, FLUSH_SECONDS, FLUSH_STEPS, Drain
from gradctl._record._describe import Describer
from gradctl._record._distributed import CompilerSkip, DataParallelTimes, world_size
from gradctl._record._ending import MAX_ALIKE, MAX_OPTIMIZERS, not_seen, totals
from gradctl._record._fallback import BackwardStream, Stand
from gradctl._record._faults import Faults
from gradctl._record._gradients import parameters_of
from gradctl._record._kept_away import KeptAway
from gradctl._record._losses import Losses
from gradctl._record._norms import NormTier, gradient_getter
from gradctl._record._order import Order
from gradctl._record._quiet import is_capturing
from gradctl._record._remembered import SavedOnce
from gradctl._record._rows import RowTier
from gradctl._record._sampling import Sampling
from gradctl._record._state import NEVER, Costs, OptimizerState

OnNonFinite = Literal["continue", "explain", "stop"]
_OUTSIDE_AT = 8


class Recorder:
    """Records what the gradients of this process do. Never prints, and never raises into the program unasked.

    Args:
        journal: where everything is written; opened at the first step.
        budget: share of wall time that recording may take.
        on_nonfinite: `stop` raises `NonFiniteGradient` from the step, before the update is applied; `explain` looks at
            each step too, so that the first one is named, and raises nothing.
        watch_steps: record only so many steps; None is all.
        lines: find the source lines that keep tensors for backward, in one step, with saved-tensor hooks.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        journal: JournalWriter,
        *,
        budget: float = 0.01,
        on_nonfinite: OnNonFinite = "continue",
        watch_steps: int | None = None,
        lines: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.journal = journal
        self._clock = clock
        self._watch_steps = watch_steps
        self._watched: int | None = None
        self.costs = Costs(clock, budget)
        self.faults = Faults(journal, self._tier_off)
        self.states: dict[int, OptimizerState] = {}
        self.by_number: dict[int, OptimizerState] = {}
        self._optimizers: dict[int, weakref.ref[Any]] = {}
        self._created: dict[int, weakref.ref[Any]] = {}
        self._made: dict[str, int] = {}
        self._alike: dict[tuple[Any, ...], list[OptimizerState]] = {}
        self._older: list[weakref.ref[Any]] | None = None
        self._handles: list[Any] = []
        self._lock = threading.RLock()
        self._names = NameBook()
        self._describer = Describer(journal, self._names, self.costs)
        self._kept_away = KeptAway(journal, self.faults)
        self._events = _events.Events(journal, self._describer.name, self._kept_away.write)
        self._stamps: list[Any] = []
        self._hot = _hot.Hot()
        self._losses = Losses(self._hot, self.faults, self._bad_loss)
        self._norms = NormTier(self.costs, self._bad_gradient, self._events.skip, self._bind)
        self._rows = RowTier(journal)
        self._sampling = Sampling(
            self.costs,
            self.faults,
            self._norms,
            self._rows,
            self._events,
            self._bind,
            stops=on_nonfinite == "stop",
            every=on_nonfinite != "continue",
        )
        self._drain = Drain(
            self._stamps,
            self.by_number,
            journal,
            self.costs,
            self._events.accumulation,
            self._late_bad_loss,
            self._fold,
        )
        self._saved = SavedOnce(journal, self.costs, self._names, self._describer.fqns, lines=lines)
        self._ddp = DataParallelTimes(journal)
        self._compiler = CompilerSkip()
        self._order = Order(
            journal,
            self.faults,
            self.costs,
            optimizers=self._live_optimizers,
            state_of=lambda optimizer: self.states.get(id(optimizer)),
        )
        self._stream = self._new_stream()
        self._functorch = 0
        self._uncounted = 0
        self._finished = False
        self._not_seen: dict[str, str] = {}

    # -- life ---------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Begin to listen; nothing is written before the first step."""
        if self._handles:
            return
        self._names.start()
        extend, clock, faults = self._stamps.extend, self._clock, self.faults
        before, after = _hot.step_hooks(
            self._hot,
            self.states,
            extend,
            clock,
            faults,
            new=self._new_state,
            due=self._sampling.before_step,
            done=self._sampling.after_step,
            drain=self._drain_now,
        )
        engine = _hot.engine_wrap(
            self._hot,
            extend,
            clock,
            faults,
            slow_loss=self._losses.read,
            bad_loss=self._losses.bad,
            waiting=self._stamps.__len__,
            overflow=self._overflow,
        )
        self._hot.before_backward = self._before_backward
        self._hot.after_backward = self._after_backward
        taps: list[tuple[str, Callable[[], Any]]] = [
            ("optimizer steps", lambda: _taps.optimizer_step.subscribe(before=before, after=after, order="record")),
            ("backwards", lambda: _taps.engine.subscribe(engine, order="record")),
            (
                "optimizers that never step",
                lambda: _taps.optimizer_created.subscribe(self._wrap_created, order="record"),
            ),
            (
                "clipping",
                lambda: _taps.clip.subscribe(_hot.clip_wrap(extend, faults, self._order.bad_norm), order="record"),
            ),
            ("the loss scale", lambda: _taps.scaler_scale.subscribe(self._losses.scale_wrap, order="record")),
            ("skipped steps", lambda: _taps.scaler_step.subscribe(self._wrap_scaler_step, order="record")),
            (
                "data time",
                lambda: _taps.data_next.subscribe(
                    _hot.data_wrap(extend, clock, self._stamps.__len__, self._overflow), order="record"
                ),
            ),
            ("torch.func", lambda: _taps.functorch_grad.subscribe(self._wrap_functorch, order="record")),
            ("DDP times", lambda: _taps.ddp_created.subscribe(self._ddp.wrap, order="record")),
            ("torch.compile", self._compiler.install),
            ("gradients kept away", self._kept_away.listen),
        ]
        if torch.distributed.is_available():
            taps.append(
                ("RPC", lambda: _taps.rpc_backward.subscribe(lambda i: self._stream.rpc_wrap(i), order="record"))
            )
        for what, subscribe in taps:
            try:
                self._handles.append(subscribe())
            except (AttributeError, ImportError) as error:  # a private name that this torch does not have
                self._not_seen[what] = f"this torch has no place to listen: {error}"
        self._order.begin()

    def drain(self) -> None:
        """Write what has been seen so far, open blocks too, so that a reader of the journal knows every step.

        Nothing is decided by it: whether backwards are the steps of a program without an optimizer stays open.
        """
        with self._lock:
            try:
                if not self.by_number:
                    return
                now = self._clock()
                self._drain_now(now)
                for state in self.by_number.values():
                    self._drain.close(state, now)
                self.journal.flush()
            except Exception as error:
                self.faults.caught("drain", error)

    def settle(self) -> None:
        """At the end of the program: decide what was left open, so that the journal is begun if there is a record."""
        with self._lock:
            try:
                if not self._stream.over and self._hot.latest is None:
                    self._stream.finish()
                self._drain_now(self._clock())
            except Exception as error:
                self.faults.caught("drain", error)

    def finish(self, how: str, code: int | None = None, exc: dict[str, Any] | None = None) -> None:
        """Write what is left and the `end` record, stop listening and let go of everything.

        Args:
            how: `exit`, `os._exit` or `stopped`.
            code: exit code, if known.
            exc: `{type, message, file, line}` of an uncaught exception.
        """
        if self._finished:
            return
        self._finished = True
        self._stop_listening()
        self.settle()
        try:
            self._last_words(how, code, exc)
        except Exception as error:
            self.faults.caught("finish", error)
        self.journal.flush()
        self._forget()

    def after_fork_in_child(self) -> None:
        """Start afresh in a forked child: what the parent has seen is the parent's."""
        self._lock = threading.RLock()
        self.faults.renew_lock()
        self.faults.count = 0
        self._names.renew_lock()
        self._drain.forget()
        self._rows.waiting.clear()
        self._events.forget()
        self._kept_away.forget()
        self._order.after_fork_in_child()
        self._forget_states()
        self._stream = self._new_stream()
        self._saved.renew()
        self._finished = False
        self.costs.began = self._clock()
        self.costs.first_step = None
        self.costs.spent = self.costs.one_off = 0.0
        self._functorch = self._uncounted = 0
        self._made.clear()
        if self._handles and "all" not in self.faults.off:
            self._hot.before_backward = self._before_backward
            self._hot.after_backward = self._after_backward

    def _stop_listening(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        self._hot.before_backward = self._hot.after_backward = None
        self._order.stop()
        self._saved.stop()

    def _forget(self) -> None:
        self._forget_states()
        self._stamps.clear()
        self._created.clear()
        self._events.forget()
        self._kept_away.forget()
        self._rows.waiting.clear()
        self._names.stop()

    def _forget_states(self) -> None:
        for state in self.by_number.values():
            state.drop()
        self.states.clear()
        self.by_number.clear()
        self._optimizers.clear()
        self._alike.clear()
        self._hot.latest = None
        self._hot.scaled.clear()
        self._sampling.closures.clear()

    def _tier_off(self, tier: str) -> None:
        if tier in ("norms", "rows", "saved", "clip", "events"):
            return  # asked for at each use
        if tier == "backward":
            self._losses.off = True
            self._hot.before_backward = self._hot.after_backward = None
            return
        if tier == "order":
            self._order.stop()
            return
        # Without stamps nothing else has a meaning.
        self.faults.off.add("all")
        self._stop_listening()

    # -- optimizers ---------------------------------------------------------------------------------------------------

    def _wrap_created(self, inner: Any) -> Any:
        def created(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            result = inner(optimizer, *args, **kwargs)
            self._remember(optimizer)
            return result

        return created

    def _remember(self, optimizer: Any) -> None:
        key = id(optimizer)
        if key in self._created:
            return
        self._created[key] = weakref.ref(optimizer, lambda _: self._created.pop(key, None))
        kind = type(optimizer).__name__
        self._made[kind] = self._made.get(kind, 0) + 1

    def _number_state(self, cls: str, source: str) -> OptimizerState:
        state = OptimizerState(len(self.by_number), cls, threading.current_thread().name, source)
        self.by_number[state.o] = state
        if self.costs.first_step is None:
            self.costs.first_step = self._clock()
        self._sampling.aligned = world_size() > 1
        return state

    def _new_state(self, optimizer: Any) -> OptimizerState | None:
        with self._lock:
            if not self._stream.over:
                self._stream.end()
            state = self._shared_state(optimizer)
            if state is None:
                if len(self.by_number) >= MAX_OPTIMIZERS:
                    self._uncounted += 1
                    return None
                state = self._number_state(type(optimizer).__name__, "optimizer")
                self._alike.setdefault(_kind_of(optimizer), []).append(state)
            key = id(optimizer)
            self.states[key] = state

            def gone(_: Any) -> None:
                if self.states.get(key) is state:
                    del self.states[key]
                state.gone = True

            self._optimizers[state.o] = weakref.ref(optimizer, gone)
            self._count_live()
            return state

    def _shared_state(self, optimizer: Any) -> OptimizerState | None:
        """Return the state of an optimizer that is gone, if many just like this one were made one after another."""
        alike = self._alike.get(_kind_of(optimizer), [])
        if len(alike) < MAX_ALIKE:
            return None
        state = next((state for state in reversed(alike) if state.gone), None)
        if state is None:
            return None
        if not state.shared:
            state.shared = True
            self._events.not_seen(
                f"{state.cls} optimizers one by one",
                f"more than {MAX_ALIKE} over the same shapes were made one after another; "
                f"those that follow are recorded as one, optimizer {state.o}",
            )
        state.gone = False
        state.keys = [id(param) for param in parameters_of(optimizer)]
        state.previous = state.row = None
        return state

    def _count_live(self) -> None:
        self._drain.live = self._sampling.live = max(1, len(self.states))

    def _new_stream(self) -> BackwardStream:
        return BackwardStream(
            Stand(
                hot=self._hot,
                stamps=self._stamps,
                clock=self._clock,
                costs=self.costs,
                norms=self._norms,
                rows=self._rows,
                new_state=lambda kind: self._number_state(
                    "distributed autograd" if kind == "rpc" else "backward", "backward"
                ),
                describe=self._describe_again,
                optimizers_exist=lambda: bool(self._created),
                drain=self._drain_now,
                schedule_row=self._sampling.schedule_row,
                stop=self._sampling.stop_for,
                every=self._sampling.every,
                faults=self.faults,
                older_exist=self._older_exist,
            )
        )

    def _older_exist(self, leaves: set[int] | None) -> bool:
        """Whether there are optimizers from before recording began; those that hold one of `leaves` are remembered."""
        if self._older is None:
            begin = self.costs.meter()
            kind: Any = torch.optim.Optimizer
            found = [weakref.ref(thing) for thing in gc.get_objects() if issubclass(type(thing), kind)]
            self._older = found
            seconds = self.costs.meter() - begin
            self.costs.spent += seconds
            self.costs.one_off += seconds
        older = [optimizer for optimizer in (reference() for reference in self._older) if optimizer is not None]
        if leaves is None:
            return bool(older)
        holders = [one for one in older if leaves & {id(param) for param in parameters_of(one)}]
        for optimizer in holders:
            self._remember(optimizer)
        return bool(holders)

    def _bind(self, state: OptimizerState, optimizer: Any) -> None:
        self._describe_again(state, parameters_of(optimizer), optimizer)

    def _describe_again(self, state: OptimizerState, params: Sequence[Tensor], optimizer: Any = None) -> None:
        if state.described:
            self._fold(state, NEVER)
            self._drain.close_maxima(state)
        self._describer.describe(state, params, optimizer)

    # -- events -------------------------------------------------------------------------------------------------------

    def _bad_gradient(self, state: OptimizerState, step: int, indexes: list[int], of: int) -> None:
        self._events.nonfinite(state, step, indexes, of)

    def _bad_loss(self) -> None:
        """A loss is NaN or inf: say so, and look at the gradients of the step that comes."""
        state = self._hot.latest
        if state is None:
            state = self._stream.bad_loss()
        if state is not None and state.loss_bad > EVENTS_KEPT:  # the run is lost: only count
            self.journal.event("nonfinite")
            return
        for other in list(self.states.values()):
            other.next_norm = min(other.next_norm, other.steps)
        self._events.bad_loss(state, state.steps + 1 if state is not None else 1, self._parameters(state))

    def _late_bad_loss(self, state: OptimizerState, step: int) -> None:
        self._events.bad_loss(state, step, self._parameters(state))

    def _parameters(self, state: OptimizerState | None) -> list[Tensor]:
        if state is not None and state is self._stream.state:
            return self._stream.params() if state.described else []
        optimizer = self._optimizer(state)
        return parameters_of(optimizer) if optimizer is not None else []

    def _optimizer(self, state: OptimizerState | None) -> Any:
        reference = self._optimizers.get(state.o) if state is not None else None
        return reference() if reference is not None else None

    def _wrap_scaler_step(self, inner: Any) -> Any:
        def maybe_step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            state = self.states.get(id(optimizer))
            before = state.steps if state is not None else 0
            result = inner(scaler, optimizer, *args, **kwargs)
            try:
                state = self.states.get(id(optimizer))
                after = state.steps if state is not None else 0
                # The scaler has just waited for its own flag: reading its scale waits for nothing more.
                if after == before and result is None and getattr(type(optimizer).step, "hooked", False):
                    scale = scaler._scale
                    self._events.skip(state, before + 1, float(scale) if scale is not None else None)
                    self._order.skipped(optimizer)
            except Exception as error:
                self.faults.caught("events", error)
            return result

        return maybe_step

    def _wrap_functorch(self, inner: Any) -> Any:
        def grad_increment_nesting(*args: Any, **kwargs: Any) -> Any:
            self._functorch += 1
            return inner(*args, **kwargs)

        return grad_increment_nesting

    # -- backwards ----------------------------------------------------------------------------------------------------

    def _before_backward(self, outputs: Any) -> None:
        latest = self._hot.latest
        if not self._stream.over:
            self._stream.before_backward()
        if "saved" not in self.faults.off and latest is not None:
            try:
                leaves = self._saved.before_backward(outputs, latest.steps, self._all_parameters)
                self._events.remember_leaves(leaves)
            except Exception as error:
                self.faults.caught("saved", error)
        if self._stream.over and self._saved.done:
            self._hot.before_backward = None

    def _after_backward(self, outputs: Any) -> BaseException | None:
        latest = self._hot.latest
        if latest is not None and "saved" not in self.faults.off:
            self._saved.after_backward(latest.steps, self._all_parameters)
        if self._sampling.closures:
            return self._sampling.inside_closure()
        if not self._stream.over:
            return self._stream.after_backward(outputs)
        if self._saved.done and not self._sampling.stops:
            self._hot.after_backward = None
        return None

    def _live_optimizers(self) -> list[Any]:
        found = [reference() for reference in [*self._created.values(), *self._optimizers.values()]]
        return list({id(optimizer): optimizer for optimizer in found if optimizer is not None}.values())

    def _all_parameters(self) -> list[Tensor]:
        found = {id(param): param for one in self._live_optimizers() for param in parameters_of(one)}
        return list(found.values())

    # -- the drain ----------------------------------------------------------------------------------------------------

    def _drain_now(self, now: float) -> None:
        if is_capturing():
            return
        begin, spent = self.costs.meter(), self.costs.spent
        with self._lock:
            self._rows.write_waiting()
            states = list(self.by_number.values())
            self._count_live()
            self._drain.empty()
            enough = False
            for state in states:
                self._fold(state, state.steps)
                if state.gone and state.block is not None and not state.shared:
                    self._drain.close(state, now)
                state.flush_at = state.steps + (FLUSH_STEPS if state.steps > EAGER_STEPS else 1)
                state.flush_time = now + FLUSH_SECONDS
                if self._ddp.is_due(state.steps):  # a short run has let go of its model when it ends
                    state.flush_at = min(state.flush_at, self._ddp.ask_at)
                if self._watch_steps is not None:
                    state.flush_at = min(state.flush_at, max(self._watch_steps, state.steps + 1))
                    enough = enough or state.steps >= self._watch_steps
                if state.stalls:
                    self._events.stall(state)
            latest = self._hot.latest
            if latest is not None:
                self._ddp.ask(latest.steps)
                if latest.steps >= _OUTSIDE_AT:
                    self._events.unoptimized({id(param) for param in self._all_parameters()})
                self._order.tick(latest, self._optimizer(latest))
            if self.journal.failed is None and states:
                self.journal.flush()
                self.journal.tail(self._drain.open_blocks, now=now)
            self.costs.spent = max(self.costs.spent, spent + self.costs.meter() - begin)
            if enough and self._handles:
                self._watched = self._watch_steps
                self._not_seen[f"steps after step {self._watch_steps}"] = "only so many were asked for (--watch-steps)"
                self._stop_listening()

    def _overflow(self) -> None:
        try:
            self._drain_now(self._clock())
        except Exception as error:
            self.faults.caught("drain", error)

    def _fold(self, state: OptimizerState, upto: int) -> None:
        if state.samples:
            self._norms.fold(state, upto, gradient_getter(self._optimizer(state)))

    def _last_words(self, how: str, code: int | None, exc: dict[str, Any] | None) -> None:
        now = self._clock()
        states = list(self.by_number.values())
        for state in states:
            self._drain.close(state, now)
            self._drain.close_maxima(state)
            if state.described and not (state.steps < 3 and state.closure):
                self._events.none(state)
            self._events.stall(state)
        self._events.unoptimized({id(param) for param in self._all_parameters()})
        self._order.finish(whole=how == "exit" and exc is None and not code and self._watched is None)
        if all(state.source == "backward" for state in states) and self._drain.backwards and not self._uncounted:
            self._events.never_stepped(self._made, self._drain.backwards)
        if self._hot.latest is not None:
            self._ddp.ask(self._hot.latest.steps, last=True)
        unseen = not_seen(
            states,
            self._drain,
            functorch=self._functorch,
            waiting=sum(1 for key in self._created if key not in self.states),
            uncounted=self._uncounted,
        )
        self.journal.write(
            "end",
            now=True,
            how=how,
            code=code,
            exc=exc,
            backwards=self._drain.backwards,
            faults=self.faults.count + len(self._names.faults),
            dropped=dict(self.journal.dropped),
            not_seen=[[what, why] for what, why in (self._not_seen | unseen).items()],
            bytes=self.journal.bytes,
            **totals(states, self.costs, now, watched=self._watched),
        )


def _kind_of(optimizer: Any) -> tuple[Any, ...]:
    """Return class, groups and shapes: optimizers of one kind can share a record."""
    with torch._C.DisableTorchFunction():
        shapes = tuple(param.shape for param in parameters_of(optimizer))
    return type(optimizer), len(optimizer.param_groups), shapes
