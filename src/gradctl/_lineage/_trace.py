"""Start and stop tracing: every interception of a trace, in one list, and its exact undoing."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl import _taps
from gradctl import _torch_private as private
from gradctl._lineage import _backward, _steps
from gradctl._lineage._facts import Placement
from gradctl._lineage._frames import Frames
from gradctl._lineage._mode import Mode
from gradctl._lineage._node import Region
from gradctl._lineage._tracer import Tracer, grad_fn_of, open_regions


class Trace:
    """A trace of this process, in every thread that Python starts while it runs.

    Args:
        into: installed packages that count as the user's code.
        script: the file that runs, if it is known.
        numerics: look at the numbers of forward and backward too (about twice the cost of a step; without, about 1.2).
        on_step: called after each optimizer step's facts are written, before the step itself.
    """

    def __init__(
        self,
        *,
        into: Sequence[str] = (),
        script: str | None = None,
        numerics: bool = True,
        on_step: Callable[[Tracer], None] | None = None,
    ) -> None:
        self.tracer = Tracer(Frames(into, script), numerics=numerics, on_step=on_step)
        self._undo = contextlib.ExitStack()
        self._mode: Mode | None = None
        self._running = False

    def start(self) -> None:
        """Begin to listen; a second call does nothing."""
        if self._running:
            return
        self._running = True
        tracer = self.tracer
        with contextlib.ExitStack() as undo:
            for handle in (
                _taps.engine.subscribe(_backward.wrap(tracer), order="measure"),
                _taps.optimizer_step.subscribe(before=self._before_step, after=self._after_step, order="record"),
                _taps.zero_grad.subscribe(_steps.wrap_zero_grad(tracer), order="record"),
                _taps.module_zero_grad.subscribe(_steps.wrap_zero_grad(tracer), order="record"),
                _taps.optimizer_created.subscribe(self._optimizer_created, order="record"),
                _taps.parameter_registered.subscribe(self._parameter_registered),
                _taps.module_registered.subscribe(self._module_registered),
                _taps.parameter_made.subscribe(self._parameter_made, order="record"),
                _taps.variable_made.subscribe(self._variable_made, order="record"),
                _taps.from_numpy.subscribe(self._from_numpy, order="record"),
                _taps.function_apply.subscribe(self._function_apply, order="record"),
                _taps.inference_entered.subscribe(self._inference_entered, order="record"),
                _taps.inference_left.subscribe(self._inference_left, order="record"),
                _taps.thread_start.subscribe(self._thread_start, order="record"),
                _taps.group_destroyed.subscribe(let_workers_finish, order="measure"),
            ):
                undo.callback(handle.remove)
            # A compiled region would trace into the mode's own Python; while traced, everything runs eagerly.
            undo.enter_context(torch.compiler.set_stance("force_eager"))
            _traced.add(tracer)
            self._undo = undo.pop_all()
        self._mode = Mode(tracer)
        self._mode.__enter__()

    def stop(self) -> None:
        """Put everything back; a second call does nothing. The facts stay."""
        if not self._running:
            return
        self._running = False
        _traced.discard(self.tracer)
        open_regions(self.tracer.here)
        self.tracer.disabled = True
        mode, self._mode = self._mode, None
        depth = private.get("function_mode_depth")()
        if mode is not None and depth and private.get("function_mode_at")(depth - 1) is mode:
            mode.__exit__(None, None, None)
        self._undo.close()

    # ---------------------------------------------------------------------------------------------- optimizers

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracer = self.tracer
        state = tracer.here
        if state.silent or tracer.blind():
            return None
        stack = tracer.frames.stack()
        closure = kwargs.get("closure") or next((a for a in args[1:] if callable(a)), None)
        if closure is None:
            self._stepping(optimizer, stack)
            state.optimizer += 1
            return None

        def with_facts() -> Any:
            depth, state.optimizer = state.optimizer, 0
            try:
                loss = closure()
            finally:
                state.optimizer = depth
            self._stepping(optimizer, stack)
            return loss

        state.optimizer += 1
        if "closure" in kwargs:
            return args, {**kwargs, "closure": with_facts}
        return tuple(with_facts if a is closure else a for a in args), kwargs

    def _stepping(self, optimizer: Any, stack: Any) -> None:
        tracer = self.tracer
        try:
            with torch._C.DisableTorchFunction():
                _steps.before_step(tracer, optimizer, stack)
        except Exception as fault:
            tracer.disable(fault)
            return
        if tracer.on_step is not None:
            tracer.on_step(tracer)

    def _after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.tracer.here
        state.optimizer = max(0, state.optimizer - 1)

    def _optimizer_created(self, inner: Any) -> Any:
        def created(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            out = inner(optimizer, *args, **kwargs)
            if not self.tracer.disabled:
                _steps.optimizer_facts(self.tracer, optimizer, self.tracer.frames.stack())
            return out

        return created

    # ---------------------------------------------------------------------------------------------- modules

    def _parameter_registered(self, module: Any, name: str, parameter: Any) -> None:
        tracer = self.tracer
        if tracer.disabled or not isinstance(parameter, Tensor):
            return
        stack = tracer.frames.stack()
        if tracer.defined.get(parameter) is None:
            tracer.defined.set(parameter, stack)
            if _defined_by_library(tracer.frames):
                tracer.of_library.set(parameter, True)
        node = tracer.map.get(parameter)
        if node is not None and node.leaf and not node.stack:
            node.stack = stack
        tracer.facts.registered.append(_placement(tracer, module, name, parameter, module._parameters, stack))

    def _module_registered(self, module: Any, name: str, child: Any) -> None:
        tracer = self.tracer
        if tracer.disabled or child is None:
            return
        tracer.facts.modules_set.append(_placement(tracer, module, name, child, module._modules, tracer.frames.stack()))

    # ---------------------------------------------------------------------------------------------- new leaves

    def _parameter_made(self, inner: Any) -> Any:
        def new(cls: Any, data: Any = None, requires_grad: bool = True, **kwargs: Any) -> Any:
            made = inner(cls, data, requires_grad, **kwargs)
            if not self.tracer.disabled and isinstance(made, Tensor):
                self.tracer.created.set(made, self.tracer.frames.stack())
                if isinstance(data, Tensor) and made is not data:
                    self._rewrapped("Parameter", data, made)
            return made

        return new

    def _variable_made(self, inner: Any) -> Any:
        def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
            made = inner(cls, *args, **kwargs)
            if args and isinstance(args[0], Tensor) and made is not args[0] and isinstance(made, Tensor):
                self._rewrapped("Variable", args[0], made)
            return made

        return call

    def _rewrapped(self, op: str, source: Tensor, made: Tensor) -> None:
        tracer = self.tracer
        if tracer.here.silent or tracer.blind() or tracer.here.optimizer:
            return
        try:
            with torch._C.DisableTorchFunction():
                behind = tracer.map.get(source)
                if behind is None or not behind.trainable:
                    return
                node = tracer.new(op, tracer.frames.stack(), [behind], [source.requires_grad])
                node.requires_grad = made.requires_grad
                node.leaf = node.trainable = True
                node.cut = "parameter" if op == "Parameter" else "variable"
                node.shape, node.dtype = tuple(made.shape), made.dtype
                node.ref = tracer.map.set(made, node)
        except Exception as fault:
            tracer.disable(fault)

    def _from_numpy(self, inner: Any) -> Any:
        def from_numpy(array: Any) -> Any:
            made = inner(array)
            tracer = self.tracer
            if not tracer.here.silent and not tracer.blind():
                try:
                    node = tracer.new("from_numpy", tracer.frames.stack())
                    node.shape, node.dtype = tuple(made.shape), made.dtype
                    node.ref = tracer.map.set(made, node)
                except Exception as fault:
                    tracer.disable(fault)
            return made

        return from_numpy

    # ---------------------------------------------------------------------------------------------- functions, modes

    def _function_apply(self, inner: Any) -> Any:
        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            tracer = self.tracer
            state = tracer.here
            if state.silent or tracer.blind():
                return inner(cls, *args, **kwargs)
            try:
                with torch._C.DisableTorchFunction():
                    tensors = [value for value in args if isinstance(value, Tensor)]
                    inputs = [tracer.node(tensor) for tensor in tensors]
                    live = [tensor.requires_grad for tensor in tensors]
                    region = Region("function", tracer.frames.stack())
                    region.library = cls.__name__
            except Exception as fault:
                tracer.disable(fault)
                return inner(cls, *args, **kwargs)
            state.functions.append(region)
            try:
                out = inner(cls, *args, **kwargs)
            finally:
                state.functions.pop()
            try:
                with torch._C.DisableTorchFunction():
                    self._applied(cls, out, tensors, inputs, live)
            except Exception as fault:
                tracer.disable(fault)
            return out

        return apply

    def _applied(self, cls: Any, out: Any, tensors: list[Tensor], inputs: list[Any], live: list[bool]) -> None:
        tracer = self.tracer
        outputs = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else []
        for output in outputs:
            if not isinstance(output, Tensor) or any(output is tensor for tensor in tensors):
                continue
            inside = tracer.map.get(output)
            if grad_fn_of(output) is None and inside is not None:
                continue  # keeps the lineage from inside, for example a reentrant checkpoint without a live input
            # What ran inside was without gradients by design; it matters only where the output has no history either.
            dead = grad_fn_of(output) is None
            more = [inside] if dead and inside is not None and inside not in inputs else []
            node = tracer.made(
                f"{cls.__name__}.apply", output, [*inputs, *more], [*live, *([False] * len(more))],
                tracer.frames.stack(),
            )  # fmt: skip
            node.extra = cls
            if f"{cls.__module__}.".startswith("gradctl."):
                node.meant = frozenset(getattr(cls, "stops", ()))
            tracer.look(node, output, tensors)

    def _inference_entered(self, inner: Any) -> Any:
        def enter(context: Any) -> Any:
            out = inner(context)
            tracer = self.tracer
            if not tracer.disabled and getattr(context, "mode", True):
                tracer.here.inference.append(_inference_region(tracer.frames))
            return out

        return enter

    def _inference_left(self, inner: Any) -> Any:
        def leave(context: Any, *args: Any) -> Any:
            state = self.tracer.here
            if state.inference and getattr(context, "mode", True):
                state.inference.pop().open = False
            return inner(context, *args)

        return leave

    # ---------------------------------------------------------------------------------------------- threads

    def _thread_start(self, inner: Any) -> Any:
        def start(function: Any, args: Any = (), *rest: Any, **kwargs: Any) -> Any:
            if self.tracer.disabled:
                return inner(function, args, *rest, **kwargs)
            self.tracer.facts.threads += 1
            begun = self.tracer.frames.stack()

            def traced(*inner_args: Any, **inner_kwargs: Any) -> Any:
                if self.tracer.disabled:
                    return function(*inner_args, **inner_kwargs)
                self.tracer.here.started = begun
                self.tracer.workers.add(threading.get_ident())
                with Mode(self.tracer):
                    return function(*inner_args, **inner_kwargs)

            return inner(traced, args, *rest, **kwargs)

        return start


def _placement(tracer: Tracer, owner: Any, name: str, value: Any, slots: Any, stack: Any) -> Placement:
    before = slots.get(name)
    return Placement(
        weakref.ref(owner),
        name,
        weakref.ref(value),
        None if before is None else weakref.ref(before),
        stack,
        tracer.seq(),
        id(value),
    )


def _inference_region(frames: Frames) -> Region:
    """Return the stretch that begins now, and whether a decorator of the user or a library began it."""
    region = Region("inference", frames.stack())
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_GRADCTL) or frame.f_code.co_filename.endswith("autograd/grad_mode.py"):
        frame = frame.f_back
    if frames.is_user(frame.f_code.co_filename):
        return region
    region.library = "library"
    if frames.is_package(frame.f_code.co_filename):
        region.within = (frame.f_code, frame.f_lasti)
    if frame.f_code.co_name in ("decorate_context", "generator_context"):
        code = getattr(inspect.unwrap(frame.f_locals.get("func", region)), "__code__", None)
        if code is not None and frames.is_user(code.co_filename):
            region.decorated, region.library = code, None
        elif code is not None and frames.is_package(code.co_filename):
            region.within = (code, -1)
    return region


def let_workers_finish(inner: Any) -> Any:
    """Wrap `destroy_process_group`: let the threads of the group drop what they hold of ours before they are joined.

    A collective remembers the function modes of the thread that began it, which are Python objects. The group is
    destroyed, and its threads are joined, under the GIL that one of them may be waiting for to drop the last of them.
    """

    def destroy(*args: Any, **kwargs: Any) -> Any:
        for _ in range(10):
            time.sleep(0.01)  # without the GIL
        return inner(*args, **kwargs)

    return destroy


def _defined_by_library(frames: Frames) -> bool:
    """Whether the nearest code that is not torch's belongs to an installed package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if frames.is_user(name):
            return False
        if not name.startswith((_TORCH, _GRADCTL, "<")):
            return True
        frame = frame.f_back
    return False


_TORCH = os.path.dirname(torch.__file__) + os.sep
_GRADCTL = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


_traced: weakref.WeakSet[Tracer] = weakref.WeakSet()


def _disable_in_child() -> None:
    for tracer in tuple(_traced):
        tracer.disabled = True


# A fork handler cannot be taken back: one for all traces of this process.
os.register_at_fork(after_in_child=_disable_in_child)
