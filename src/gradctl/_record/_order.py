"""The order of a step: which calls stand between two steps of an optimizer, and where in the user's source.

Every call is heard in the first steps, and after that in rare short stretches and after a step that a scaler skipped;
in between nothing of this is subscribed. Only of a program that accumulates the place of each backward is noted all
the time: what is left over shows at its end. Judges nothing: see `gradctl._verdict._stepping`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradctl import _taps
from gradctl._journal import JournalWriter
from gradctl._record import _loops, _quiet
from gradctl._record._faults import Faults
from gradctl._record._forms import Forms, Group, Op
from gradctl._record._gradients import are_plain
from gradctl._record._lanes import Lane, Stretch
from gradctl._record._marks import Marks, Watched
from gradctl._record._places import Call, Places
from gradctl._record._roots import mark_scaled, read_root
from gradctl._record._state import Costs, OptimizerState

_MOST_OPTIMIZERS = 8
_SKIPS = 20
_OVERFLOWS = 20
_NEXT = 128
_GROWTH = 4
_BIG_LIMIT = 0.01
"""A limit of this share of the loss scale may have been multiplied by it."""
_BIG_ANYWAY = 1000.0
_KIND = {"mean": "m", "sum": "t", "divided": "d", "other": "z"}


class Order:
    """Watches the order of a step.

    Args:
        journal: where forms are written.
        faults: where our own faults go.
        costs: what was spent.
        optimizers: returns the optimizers that are alive.
        state_of: returns what is known of one that has stepped.
    """

    def __init__(
        self,
        journal: JournalWriter,
        faults: Faults,
        costs: Costs,
        *,
        optimizers: Callable[[], Iterable[Any]],
        state_of: Callable[[Any], OptimizerState | None],
    ) -> None:
        self._journal, self._faults, self._costs = journal, faults, costs
        self._optimizers, self._state_of = optimizers, state_of
        self._places = Places()
        self._forms = Forms(journal, self._places)
        self._handles: list[_taps.Handle] = []
        self._lanes: dict[int, Lane] = {}
        self._stretch: Stretch | None = None
        self._watched: dict[int, Watched] = {}
        self._claims: dict[int, int] = {}
        self._threads: set[int] = set()
        self._looking = threading.RLock()
        self._numbers: dict[Any, int] = {}
        self._next = _NEXT
        self._skips = self._overflows = 0
        self._marked = False
        self._begun = self._ended = self._finished = False

    # -- stretches ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Watch the first steps; a second call does nothing."""
        if not self._begun:
            self._begun = True
            self._open(Stretch(first=True, clean=None))

    def tick(self, state: OptimizerState | None, optimizer: Any) -> None:
        """Write what is new; after a step of `optimizer`, watch a few more if it is time.

        Args:
            state: of the optimizer that stepped last.
            optimizer: that optimizer.
        """
        if self._ended or "order" in self._faults.off:
            return
        self._forms.write()
        if self._stretch is None and state is not None and optimizer is not None and state.steps >= self._next:
            while self._next <= state.steps:
                self._next *= _GROWTH
            self._open(Stretch(first=False, clean=id(optimizer)))

    def skipped(self, optimizer: Any) -> None:
        """A scaler has skipped a step: watch what follows it."""
        lane = self._lanes.get(threading.get_ident())
        if lane is not None:
            lane.pending.clear()
        if self._ended or self._stretch is not None or self._skips >= _SKIPS or "order" in self._faults.off:
            return
        self._skips += 1
        self._open(Stretch(first=False, clean=id(optimizer)))
        self._lane().close(id(optimizer), "skip")

    def bad_norm(self, parameters: Any, total: Any) -> None:
        """A norm to clip by is not finite: write it down if only the norm is, because its type has no larger number."""
        if self._overflows >= _OVERFLOWS or type(total) is not Tensor or not isinstance(parameters, list):
            return
        with _quiet.Quiet():
            if total.dtype is not torch.float16:
                return
            grads = [param.grad for param in parameters if param.grad is not None]
            if not are_plain(grads):
                return  # of a sharded gradient this process has a part, and asking for the whole would be a collective
            if not bool(torch.isinf(total)) or not all(bool(torch.isfinite(grad).all()) for grad in grads):
                return
            exact = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]).norm()
        self._overflows += 1
        site = self._places.quick()
        self._forms.write_sites()
        self._journal.event("norm_overflow", s=site, norm=float(exact), tensors=len(grads))

    def finish(self, *, whole: bool) -> None:
        """Write everything and stop.

        Args:
            whole: the program has come to its end, so that backwards without a step are left over for good.
        """
        if self._finished:
            return
        self._finished = True
        self.stop()
        self._forms.write(last=True)
        for lane in list(self._lanes.values()):
            if whole and lane.pending and lane.stepped is not None:
                self._forms.write_sites()
                self._journal.event("left", o=lane.stepped, sites=lane.pending[-64:], count=len(lane.pending))
        self._lanes.clear()

    def stop(self) -> None:
        """Stop listening."""
        self._ended = True
        self._close()

    def after_fork_in_child(self) -> None:
        """Start afresh: what the parent has seen is the parent's."""
        self._lanes.clear()
        self._claims.clear()
        self._threads.clear()
        self._looking = threading.RLock()  # another thread of the parent may have held it
        self._forms.forget()
        if self._stretch is not None:
            self._stretch = Stretch(first=True, clean=None)

    def _open(self, stretch: Stretch) -> None:
        self._close()
        self._lanes.clear()
        self._watched.clear()
        self._stretch = stretch
        self._listen(
            lambda: _taps.engine.subscribe(self._wrap_engine, order="record"),
            lambda: _taps.clip.subscribe(self._wrap_clip, order="record"),
            lambda: _taps.scaler_scale.subscribe(self._wrap_scale, order="record"),
            lambda: _taps.scaler_call.subscribe(self._wrap_scaler_step, order="record"),
            lambda: _taps.scaler_unscale.subscribe(self._wrap_unscale, order="record"),
            lambda: _taps.scaler_update.subscribe(self._wrap_update, order="record"),
            lambda: _taps.scheduler_moves.subscribe(self._wrap_scheduler, order="record"),
            lambda: _taps.zero_grad.subscribe(self._wrap_zero, order="record"),
            lambda: _taps.module_zero_grad.subscribe(self._wrap_module_zero, order="record"),
            lambda: _taps.data_next.subscribe(self._wrap_data, order="record"),
            lambda: _taps.optimizer_step.subscribe(before=self._before, after=self._after, order="record"),
        )

    def _open_light(self) -> None:
        """Note the places of backwards, and what clears them, and nothing else."""
        self._listen(
            lambda: _taps.engine.subscribe(self._wrap_engine_light, order="record"),
            lambda: _taps.zero_grad.subscribe(self._wrap_zero_light, order="record"),
            lambda: _taps.module_zero_grad.subscribe(self._wrap_zero_light, order="record"),
            lambda: _taps.optimizer_step.subscribe(after=self._after_light, order="record"),
        )

    def _listen(self, *subscribe: Callable[[], _taps.Handle]) -> None:
        for one in subscribe:
            try:
                self._handles.append(one())
            except (AttributeError, ImportError):
                continue  # this torch has no such place: the rules that need it stay silent

    def _close(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        self._stretch = None

    def _end_stretch(self) -> None:
        self._close()
        self._watched.clear()
        for lane in list(self._lanes.values()):
            lane.ops.clear()
            lane.marks.clear()
        if self._forms.accumulates and not self._ended:
            self._open_light()

    def _lane(self) -> Lane:
        ident = threading.get_ident()
        lane = self._lanes.get(ident)
        if lane is None:
            with self._looking:  # a thread that is new does not begin while another one looks at gradients
                self._threads.add(ident)
                lane = self._lanes[ident] = Lane()
        return lane

    def _number(self, thing: Any) -> int:
        return self._numbers.setdefault(thing, len(self._numbers))

    def _guarded(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call one of our own, at our own expense; a fault of ours never reaches the program."""
        if "order" in self._faults.off or self._stretch is None:
            return None
        costs = self._costs
        begin = costs.meter()
        try:
            with torch._C.DisableTorchFunction():
                return call(*args)
        except Exception as error:
            self._faults.caught("order", error)
            return None
        finally:
            seconds = costs.meter() - begin
            costs.spent += seconds
            costs.one_off += seconds

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _all_watched(self) -> dict[int, Watched]:
        watched = self._watched
        for optimizer in self._optimizers():
            if id(optimizer) not in watched:
                watched[id(optimizer)] = Watched(optimizer)
        for key in [key for key, one in list(watched.items()) if one.reference() is None]:
            watched.pop(key, None)  # another thread may have been here
            self._claims.pop(key, None)
        if len(watched) > _MOST_OPTIMIZERS:
            self.stop()
            return {}
        return watched

    def _marks(self) -> dict[int, Marks]:
        with self._looking:
            return {key: one.marks() for key, one in list(self._all_watched().items()) if self._is_mine(key, one)}

    def _is_mine(self, key: int, watched: Watched) -> bool:
        """Whether this thread may look at the gradients of an optimizer.

        The engine puts a gradient in its place without Python's lock: who reads it from another thread meanwhile may
        end the program by a segmentation fault.
        """
        claim = self._claims.get(key)
        if claim is not None:
            return claim == threading.get_ident()
        state = self._state_of(watched.reference())
        if state is not None:
            return state.thread == threading.current_thread().name
        return len(self._threads) < 2 and self._stretch is not None and self._stretch.first

    def _refresh(self, lane: Lane) -> None:
        lane.marks = self._marks()

    # -- wraps --------------------------------------------------------------------------------------------------------

    def _wrap_engine(self, inner: Any) -> Any:
        graph_task, dispatch_modes = _quiet.graph_task, _quiet.dispatch_modes

        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            if graph_task() != -1:
                return inner(outputs, *args, **kwargs)
            if not kwargs.get("accumulate_grad"):
                if not dispatch_modes():
                    self._lane().grads = True
                return inner(outputs, *args, **kwargs)
            before = self._guarded(self._before_backward, outputs, args)
            result = inner(outputs, *args, **kwargs)
            if before is not None:
                self._guarded(self._after_backward, *before)
            return result

        return run_backward

    def _before_backward(self, outputs: Any, args: Any) -> tuple[Op, Call, dict[int, Marks]] | None:
        if _quiet.is_capturing():
            return None
        lane, call = self._lane(), self._places.here()
        root = outputs[0]
        if not isinstance(root, Tensor):
            return None
        kind, scaled = read_root(root, marks=self._marked)
        flags = _KIND[kind]
        flags += "s" if scaled else ""
        flags += "a" if torch.is_autocast_enabled(root.device.type) else ""
        flags += "" if call.direct else "l"
        flags += "k" if len(args) > 1 and args[1] and not (len(args) > 2 and args[2]) else ""
        flags += "g" if call.gradient or len(outputs) > 1 else ""
        flags += "q" if lane.grads or (len(args) > 2 and args[2]) else ""
        flags += "i" if lane.inside else ""
        op = Op("B", call.site, flags, which=lane.fetched)
        return op, call, self._marks()

    def _after_backward(self, op: Op, call: Call, before: dict[int, Marks]) -> None:
        lane, after = self._lane(), self._marks()
        for key, now in after.items():
            then = before.get(key)
            reached = now.reached(then) if then is not None else ()
            if not reached:
                continue
            assert then is not None
            flags = "r"
            last = lane.marks.get(key)
            if last is not None and len(last.grads) == len(then.grads) and last.value == then.value:
                same = all(last.grads[i] is not None and last.grads[i] == then.grads[i] for i in reached)
                flags += "c" if same else ""
            flags += "h" if self._watched[key].has_hooks() else ""
            op.own[key] = flags, self._number(reached)
        lane.add(op)
        lane.marks, lane.stack = after, call.stack
        lane.grads, lane.fetched = False, -1
        if not lane.inside:
            lane.pending.append(op.site)

    def _wrap_clip(self, inner: Any) -> Any:
        def clip(parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any) -> Any:
            self._guarded(self._clip, parameters, max_norm, total_norm)
            result = inner(parameters, max_norm, total_norm, *args, **kwargs)
            self._guarded(self._refresh, self._lane())
            return result

        return clip

    def _clip(self, parameters: Any, max_norm: Any, total_norm: Any) -> None:
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        if not isinstance(parameters, list | tuple):
            return  # an iterator would be empty for the one that it is meant for
        lane, limit = self._lane(), float(max_norm)
        ids = frozenset(map(id, parameters))
        flags = "" if ids else "0"
        with torch._C.DisableTorchFunction():
            flags += "" if not ids or any(param.grad is not None for param in parameters) else "n"
        flags += "i" if limit == float("inf") else ""
        big = limit >= (_BIG_ANYWAY if lane.scale is None else _BIG_LIMIT * lane.scale)
        op = Op("C", self._places.here().site, flags + ("b" if big else ""), which=self._number(ids))
        marks = self._marks()
        for key, watched in list(self._all_watched().items()):
            held = {id(param) for param in watched.params()}
            if held & ids:
                changed = key in lane.marks and lane.marks[key] != marks[key]
                op.own[key] = "o" + ("e" if changed else ""), -1
        lane.add(op)
        norm = None
        if isinstance(total_norm, float):
            norm = total_norm
        elif type(total_norm) is Tensor and total_norm.is_cpu and total_norm.numel() == 1:
            with _quiet.Quiet():
                norm = float(total_norm)
        lane.clip = norm, limit, lane.scale

    def _wrap_scale(self, inner: Any) -> Any:
        def scale(scaler: Any, outputs: Any) -> Any:
            result = inner(scaler, outputs)
            if result is not outputs:
                self._guarded(self._scaled, scaler, result)
            return result

        return scale

    def _scaled(self, scaler: Any, result: Any) -> None:
        mark_scaled(result)
        self._marked = True
        lane = self._lane()
        lane.scale = _scale_of(scaler)
        lane.add(Op("x", self._places.here().site))

    def _wrap_scaler_step(self, inner: Any) -> Any:
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if not scaler.is_enabled():
                return inner(scaler, optimizer, *args, **kwargs)
            lane = self._lane()
            begun = self._guarded(self._scaler_steps, lane, optimizer)
            lane.scaling = id(optimizer)
            try:
                result = inner(scaler, optimizer, *args, **kwargs)
            finally:
                lane.scaling = 0
            if begun is not None:
                self._guarded(self._scaler_stepped, lane, optimizer, *begun)
            return result

        return step

    def _scaler_steps(self, lane: Lane, optimizer: Any) -> tuple[Op, Call, int]:
        call = self._places.here()
        op = Op("t", call.site, about=id(optimizer))
        lane.add(op)
        return op, call, lane.begin.get(id(optimizer), -1)

    def _scaler_stepped(self, lane: Lane, optimizer: Any, op: Op, call: Call, begin: int) -> None:
        lane.unscaled.pop(id(optimizer), None)
        if lane.begin.get(id(optimizer), -1) == begin and getattr(type(optimizer).step, "hooked", False):
            op.flags += "!"
            self._refresh(lane)
            self._group(lane, optimizer, "skip", call)

    def _wrap_unscale(self, inner: Any) -> Any:
        def unscale_(scaler: Any, optimizer: Any) -> Any:
            lane = self._lane()
            asked = scaler.is_enabled() and lane.scaling != id(optimizer)
            if asked:
                self._guarded(self._unscales, lane, optimizer)
            try:
                result = inner(scaler, optimizer)
            except RuntimeError as error:
                if asked and "already been called" in str(error):
                    self._guarded(self._unscaled_twice, lane, optimizer)
                raise
            self._guarded(self._refresh, lane)
            return result

        return unscale_

    def _unscales(self, lane: Lane, optimizer: Any) -> None:
        lane.add(Op("u", self._places.here().site, about=id(optimizer)))

    def _unscaled_twice(self, lane: Lane, optimizer: Any) -> None:
        places = [op.site for op in lane.ops if op.kind == "u" and op.about == id(optimizer)]
        state = self._state_of(optimizer)
        self._forms.write_sites()
        first = places[-2] if len(places) > 1 else -1
        self._journal.event("unscale_twice", o=None if state is None else state.o, s=places[-1], first=first)

    def _wrap_update(self, inner: Any) -> Any:
        def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._guarded(_scale_of, scaler)
            result = inner(scaler, *args, **kwargs)
            if scaler.is_enabled():
                self._guarded(self._updated, scaler, before)
            return result

        return update

    def _updated(self, scaler: Any, before: float | None) -> None:
        changed = before != _scale_of(scaler)
        self._lane().add(Op("d", self._places.here().site, "c" if changed else ""))

    def _wrap_scheduler(self, inner: Any) -> Any:
        def enter(mode: Any) -> Any:
            self._guarded(self._scheduled, mode)
            return inner(mode)

        return enter

    def _scheduled(self, mode: Any) -> None:
        scheduler = mode.o
        starts = getattr(scheduler, "_is_initial", None)
        if starts or (starts is None and getattr(scheduler, "_step_count", 2) <= 1):
            return  # it is being made
        lane, call = self._lane(), self._places.here()
        flags = ("p" if _is_placed(scheduler) else "") + ("" if call.direct else "l")
        number = self._number(("scheduler", id(scheduler)))
        lane.add(Op("L", call.site, flags, about=id(getattr(scheduler, "optimizer", None)), which=number))

    def _wrap_zero(self, inner: Any) -> Any:
        def zero_grad(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._guarded(self._zeroed, "", id(optimizer))
            return inner(optimizer, *args, **kwargs)

        return zero_grad

    def _wrap_module_zero(self, inner: Any) -> Any:
        def zero_grad(module: Any, *args: Any, **kwargs: Any) -> Any:
            self._guarded(self._zeroed, "m", 0)
            return inner(module, *args, **kwargs)

        return zero_grad

    def _zeroed(self, flags: str, about: int) -> None:
        lane, call = self._lane(), self._places.here()
        if about:
            self._claims[about] = threading.get_ident()
        lane.add(Op("Z", call.site, flags, about=about))
        if lane.pending:
            self._forms.cleared(lane.pending, call.site)
            lane.pending.clear()

    def _wrap_data(self, inner: Any) -> Any:
        def next_batch(iterator: Any) -> Any:
            batch = inner(iterator)
            lane = self._lane()
            lane.fetched = self._number(("loader", id(getattr(iterator, "_dataset", iterator))))
            return batch

        return next_batch

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._guarded(self._steps, optimizer)

    def _steps(self, optimizer: Any) -> None:
        lane, call, key = self._lane(), self._places.here(), id(optimizer)
        self._claims[key] = threading.get_ident()
        flags = "v" if lane.scaling == key else ""
        watched = self._all_watched().get(key)
        if watched is not None:
            changed = key in lane.marks and lane.marks[key] != watched.marks()
            flags += ("e" if changed else "") + ("h" if watched.has_hooks() else "")
        lane.add(Op("S", call.site, flags + ("" if call.direct else "l"), about=key))
        lane.inside = key

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._guarded(self._stepped, optimizer)

    def _stepped(self, optimizer: Any) -> None:
        lane = self._lane()
        lane.inside = 0
        self._refresh(lane)
        self._group(lane, optimizer, "step", self._places.here())

    def _group(self, lane: Lane, optimizer: Any, end: str, call: Call) -> None:
        key, state, stretch = id(optimizer), self._state_of(optimizer), self._stretch
        ops, after = lane.group(key), lane.after.get(key, "start")
        whole = stretch is None or stretch.counts(key)
        if ops is not None and state is not None and whole:
            # the recorder counts the step after us
            sites = [op.site for op in ops if op.kind == "B" and key in op.own]
            loop = _loop(lane, call) if len(set(sites)) < len(sites) else ""
            self._forms.book(state.o, state.steps + 1, key, ops, Group(after, end, loop, lane.clip))
        lane.close(key, end)
        if state is not None:
            lane.stepped = state.o
        if stretch is not None and stretch.over:
            self._end_stretch()

    # -- between stretches --------------------------------------------------------------------------------------------

    def _wrap_engine_light(self, inner: Any) -> Any:
        graph_task = _quiet.graph_task

        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = inner(outputs, *args, **kwargs)
            if kwargs.get("accumulate_grad") and graph_task() == -1:
                self._lane().pending.append(self._places.quick())
            return result

        return run_backward

    def _wrap_zero_light(self, inner: Any) -> Any:
        def zero_grad(owner: Any, *args: Any, **kwargs: Any) -> Any:
            lane = self._lane()
            if lane.pending:
                self._forms.cleared(lane.pending, self._places.quick())
                lane.pending.clear()
            return inner(owner, *args, **kwargs)

        return zero_grad

    def _after_light(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        lane = self._lane()
        lane.pending.clear()
        state = self._state_of(optimizer)
        if state is not None:
            lane.stepped = state.o


def _scale_of(scaler: Any) -> float | None:
    """Return the scale of a scaler; None where reading it would wait for a device."""
    scale = getattr(scaler, "_scale", None)  # a scaler that is switched off has none
    with _quiet.Quiet():
        return float(scale) if isinstance(scale, Tensor) and scale.is_cpu else None


def _loop(lane: Lane, call: Call) -> str:
    """Return what the source says about this step and the last backward, where they meet in one function."""
    backward = {(stand.frame, stand.code): stand.line for stand in lane.stack}
    for stand in call.stack:
        line = backward.get((stand.frame, stand.code))
        if line is not None:
            return _loops.how(stand.code.co_filename, line, stand.line)
    return ""


def _is_placed(scheduler: Any) -> bool:
    """Whether a scheduler was told its position, so that it does not matter how often it is called."""
    if type(scheduler).__name__ == "CosineAnnealingWarmRestarts":
        return True  # its step takes fractions of an epoch
    frame = sys._getframe(1)
    for _ in range(8):
        if frame.f_code.co_name == "_update_lr":
            return frame.f_locals.get("epoch") is not None
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False
