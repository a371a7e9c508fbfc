"""The TorchFunctionMode that sees every torch call of one thread, and keeps lineage through breaks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from gradctl._lineage._facts import ErrorFacts, FlagChange, HookFacts
from gradctl._lineage._frames import Stack, is_own, own_call
from gradctl._lineage._node import Node, Region
from gradctl._lineage._operations import ONE_TO_ONE, REWRAPS, Plan, plan_for
from gradctl._lineage._single import NORMALISING, note_single
from gradctl._lineage._tracer import Tracer, is_leaf, open_regions, shape_of
from gradctl._lineage._walk import sources_of

_TORCH_TENSORS = (Tensor, Parameter)


class Mode(TorchFunctionMode):
    """Sees the torch calls of the thread that entered it.

    A call is passed on unchanged, and its result returned as it is. What our own bookkeeping raises never reaches the
    program: the tracer disables itself.

    Args:
        tracer: where the facts go.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._plans: dict[Any, Plan] = {}
        self._state = tracer.here

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = plan_for(func, frozenset(HANDLERS))
        tracer, state = self._tracer, self._state
        if state.silent or tracer.blind():
            return func(*args, **kwargs)
        if plan.kind == "pass":
            try:
                return func(*args, **kwargs)
            except Exception as error:
                note_failure(tracer, error, plan.name, tensors_in(args, kwargs))
                raise
        if plan.kind == "special":
            return HANDLERS[plan.name](tracer, func, args, kwargs)
        tensors = tensors_in(args, kwargs)
        stack: Stack | None = None
        inputs: list[Node] = []
        live: list[bool] = []
        try:
            guard = any([type(tensor) not in _TORCH_TENSORS for tensor in tensors])
            with torch._C.DisableTorchFunctionSubclass() if guard else _NOTHING:
                in_place = bool(tensors) and (plan.in_place or "out" in kwargs or kwargs.get("inplace") is True)
                if in_place and any([tensor.is_inference() for tensor in tensors]):
                    in_place = False
                versions = [tensor._version for tensor in tensors] if in_place else ()
                inside = state.optimizer > 0 and not in_closure(tracer)
                if not inside:
                    sources = tensors if plan.values == "all" else tensors[:1] if plan.values == "first" else []
                    inputs = [tracer.node(tensor) for tensor in sources]
                    # A view made under no_grad says that it requires a gradient, and has no history of its own.
                    live = [
                        tensor.requires_grad and (node.live or node.leaf)
                        for tensor, node in zip(sources, inputs, strict=True)
                    ]
                    if len(inputs) == 2 and inputs[0].grads and inputs[1].grads:
                        _meets_itself(tracer, plan.name, tensors, inputs)
        except Exception as fault:
            tracer.disable(fault)
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            note_failure(tracer, error, plan.name, tensors)
            raise
        try:
            with torch._C.DisableTorchFunctionSubclass() if guard else _NOTHING:
                if inside:
                    if in_place:
                        tracer.mutated(plan.name, tensors, versions, tracer.frames.stack(), optimizer=True)
                    return out
                if plan.kind == "escape":
                    if inputs and inputs[0].trainable:
                        tracer.escaped(tensors[0], plan.name, out, tracer.frames.stack())
                    return out
                outputs: list[Tensor] = (
                    [out] if isinstance(out, Tensor)
                    else [item for item in out if isinstance(item, Tensor)] if isinstance(out, (tuple, list))
                    else []
                )  # fmt: skip
                if not outputs and not in_place:
                    return out
                stack = tracer.frames.stack()
                if in_place:
                    for tensor in tracer.mutated(plan.name, tensors, versions, stack, optimizer=False):
                        self._changed(tracer, plan.name, tensor, inputs, live, stack, tensors)
                scalars: tuple[Any, ...] | None = None
                for output in outputs:
                    if any([output is tensor for tensor in tensors]):
                        continue
                    if plan.name in ONE_TO_ONE and len(outputs) == len(inputs):
                        position = next(n for n, item in enumerate(outputs) if item is output)
                        node = tracer.made(plan.name, output, inputs[position:][:1], live[position:][:1], stack)
                    else:
                        node = tracer.made(plan.name, output, inputs, live, stack)
                    if scalars is None:
                        scalars = (
                            numbers_in(args)
                            if plan.name in REWRAPS
                            else tuple([value for value in args if type(value) in (float, int)])
                        )
                    node.scalars = scalars
                    tracer.look(node, output, tensors)
                    if plan.name in NORMALISING and node.live:
                        note_single(tracer, node, args, kwargs)
        except Exception as fault:
            tracer.disable(fault)
        return out

    @staticmethod
    def _changed(
        tracer: Tracer,
        op: str,
        tensor: Tensor,
        inputs: list[Node],
        live: list[bool],
        stack: Stack,
        arguments: list[Tensor],
    ) -> None:
        """Give a tensor that was changed in place, and its base, their new nodes."""
        if is_leaf(tensor) and (tensor.requires_grad or isinstance(tensor, Parameter)):
            return
        owner = tracer.map.get(tensor)
        if owner is not None and owner.op == "grad":
            return
        node = tracer.made(op, tensor, inputs, live, stack)
        node.extra = "in place"
        tracer.look(node, tensor, [other for other in arguments if other is not tensor])
        base = tensor._base
        if base is not None and not (is_leaf(base) and base.requires_grad):
            tracer.made(op, base, [*inputs, tracer.node(base)], [*live, base.requires_grad], stack).extra = "in place"


class HookMode(TorchFunctionMode):
    """Sees what the user's hooks do to gradients while the engine runs; all else there is no forward of the program.

    Args:
        tracer: where the facts go.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._plans: dict[Any, Plan] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = plan_for(func, frozenset(HANDLERS))
        tracer = self._tracer
        if plan.name in _OF_GRADIENTS and not tracer.blind():
            return HANDLERS[plan.name](tracer, func, args, kwargs)
        out = func(*args, **kwargs)
        changed: Any = args[0] if plan.in_place and args else None
        if isinstance(changed, Tensor) and not tracer.blind():
            try:
                owner = tracer.map.get(changed)
                if owner is not None and owner.op == "grad" and isinstance(owner.extra, int):
                    tracer.grad_event("edit", [owner.extra], plan.name, tracer.frames.stack())
            except Exception as fault:
                tracer.disable(fault)
        return out


_NOTHING = contextlib.nullcontext()


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among arguments, two levels of lists deep."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            for item in value:
                if isinstance(item, Tensor):
                    found.append(item)
                elif type(item) in (list, tuple):
                    found += [part for part in item if isinstance(part, Tensor)]
    for value in kwargs.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def numbers_in(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the Python numbers from which a tensor is built, those in one list included."""
    found: list[Any] = []
    for value in args[:1]:
        items = value[:64] if type(value) in (list, tuple) else [value]
        found += [item for item in items if isinstance(item, (float, int))]
    return tuple(found)


def in_closure(tracer: Tracer) -> bool:
    """Whether the user's code runs nearer than the optimizer's: a closure, or an optimizer written by the user."""
    stack_frame: Any = inspect.currentframe()
    while stack_frame is not None:
        name = stack_frame.f_code.co_filename
        if tracer.frames.is_user(name):
            return True
        if "/torch/optim/" in name:
            return False
        stack_frame = stack_frame.f_back
    return False


def note_failure(tracer: Tracer, error: BaseException, op: str, tensors: list[Tensor]) -> None:
    """Keep what is known about the arguments of a torch call that raised."""
    if tracer.facts.error is not None and tracer.facts.error.error is error:
        return  # the engine has noted it already, and knows more
    try:
        state = tracer.here
        tracer.facts.error = ErrorFacts(
            error, op, tuple([tracer.node(tensor) for tensor in tensors]),
            tuple([tensor.is_inference() for tensor in tensors]), tracer.frames.stack(),
            grad_enabled=torch.is_grad_enabled(), regions=open_regions(state),
        )  # fmt: skip
    except Exception as fault:
        tracer.disable(fault)


# ---------------------------------------------------------------------------------------------- special functions


def _looking(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Run `handler(tracer, result, args, kwargs, before)` after the call; its faults disable the tracer."""

    def handle(tracer: Tracer, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            before = handler.before(tracer, args) if hasattr(handler, "before") else None  # type: ignore[attr-defined]
        except Exception as fault:
            tracer.disable(fault)
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            note_failure(tracer, error, getattr(func, "__name__", "?"), tensors_in(args, kwargs))
            raise
        try:
            with torch._C.DisableTorchFunctionSubclass():
                handler(tracer, out, args, kwargs, before)
        except Exception as fault:
            tracer.disable(fault)
        return out

    return handle


def _set_grad_enabled(tracer: Tracer, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    was = torch._C.is_grad_enabled()
    out = func(*args, **kwargs)
    now = torch._C.is_grad_enabled()
    if was == now:
        return out
    try:
        _region_changed(tracer, opened=was)
    except Exception as fault:
        tracer.disable(fault)
    return out


def _region_changed(tracer: Tracer, *, opened: bool) -> None:
    state = tracer.here
    frame: Any = inspect.currentframe()
    frame = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    leaving = False
    decorated = library = within = None
    for _ in range(16):
        if frame is None:
            break
        name = frame.f_code.co_filename
        if tracer.frames.is_user(name):
            break
        called = frame.f_code.co_name
        if called == "__exit__" and name.endswith("grad_mode.py"):
            leaving = True
        if called in ("decorate_context", "generator_context") and "func" in frame.f_locals:
            code = getattr(inspect.unwrap(frame.f_locals["func"]), "__code__", None)
            if code is not None and tracer.frames.is_user(code.co_filename):
                decorated = code
            elif code is not None and within is None and tracer.frames.is_package(code.co_filename):
                within = (code, -1)
        elif within is None and tracer.frames.is_package(name):
            within = (frame.f_code, frame.f_lasti)
        if "/distributions/" in name:
            library = "sample"
        elif name.endswith("utils/checkpoint.py"):
            library = "checkpoint"
        elif "/optim/" in name:
            library = "optimizer"
        elif is_own(name) and library is within is None:
            library = "gradctl"
        frame = frame.f_back
    if opened:
        if leaving and state.suspended:
            region = state.suspended.pop()
            region.open = region.resumed = True
        else:
            stack = tracer.frames.stack()
            region = Region("no_grad", stack or state.started)
            # A thread's own start (the initializer of a pool) switched it off: for all that the thread will run.
            region.left_on = not stack and bool(state.started)
            region.decorated, region.library, region.within = decorated, library, within if stack else None
            region.frame = (id(frame), id(frame.f_code) if frame is not None else 0)
            region.generator = frame is not None and bool(frame.f_code.co_flags & inspect.CO_GENERATOR)
        state.off.append(region)
    elif state.off:
        region = state.off.pop()
        region.open = False
        if not leaving:
            state.suspended.append(region)
            if len(state.suspended) > 64:
                del state.suspended[0]


def _data_read(tracer: Tracer, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
    tensor = args[0]
    if tracer.here.optimizer and not in_closure(tracer):
        return
    source = tracer.node(tensor)
    node = tracer.made("data.__get__", out, [source], [tensor.requires_grad], tracer.frames.stack())
    if source.op == "grad":
        node.op, node.extra = "grad", source.extra
    tracer.through_data.set(out, tracer.through_data.get(tensor) or id(tensor))


def _data_written(tracer: Tracer, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
    if not tracer.here.optimizer:
        tracer.facts.data_sets.append((id(args[0]), tracer.frames.stack(), tracer.seq()))
    parameter = tracer.facts.parameters.get(id(args[0]))
    if parameter is not None and tracer.facts.generation > 0 and not tracer.here.optimizer and own_call() is None:
        parameter.hand_written += 1
    owner = tracer.map.get(args[0])
    if owner is not None and owner.op == "grad" and isinstance(owner.extra, int):
        sources = sources_of(tracer.map.get(args[1])) if len(args) > 1 else None
        tracer.grad_event("edit", [owner.extra], "data.__set__", tracer.frames.stack(), sources=sources)


def _flag_changed(tracer: Tracer, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
    import weakref

    tensor = args[0]
    if before == tensor.requires_grad:
        return
    stack = tracer.frames.stack()
    tracer.facts.flags.append(
        FlagChange(
            id(tensor),
            weakref.ref(tensor),
            tensor.requires_grad,
            stack,
            tracer.facts.generation,
            tracer.seq(),
            own_call(),
        )
    )
    node: Node | None = tracer.map.get(tensor)
    if tensor.requires_grad and node is not None and not node.leaf and not node.live:
        forced = tracer.new("requires_grad_forced", stack, [node], [False])
        forced.requires_grad = forced.trainable = forced.leaf = True
        forced.shape, forced.dtype = tuple(tensor.shape), tensor.dtype
        forced.ref = tracer.map.set(tensor, forced)


_flag_changed.before = lambda tracer, args: args[0].requires_grad  # type: ignore[attr-defined]


def _grad_read(tracer: Tracer, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
    tensor = args[0]
    frame = _caller()
    user = frame is not None and tracer.frames.is_user(frame.f_code.co_filename)
    facts = tracer.facts
    if out is not None:
        known = tracer.map.get(out)
        if user or known is None or known.op != "grad":
            is_gradient(tracer, tensor, out, known, tracer.frames.stack())
            if user:
                _read_anew(tracer, tensor, out, known)
    if not user:
        return
    facts.read_by_user.add(id(tensor))
    if out is None and facts.generation > 0 and tensor.requires_grad:
        stack = tracer.frames.stack()
        node = tracer.node(tensor)
        facts.none_read = (node, is_leaf(tensor), stack)
        if not is_leaf(tensor) and not tensor.retains_grad and len(facts.non_leaf_reads) < 100:
            facts.non_leaf_reads.append((node, stack))
        elif is_leaf(tensor):
            tracer.explain_now(tensor)


def is_gradient(tracer: Tracer, tensor: Tensor, grad: Tensor, known: Node | None, stack: Stack) -> None:
    """Give the tensor that is the `.grad` of another its node."""
    node = tracer.new("grad", stack)
    node.extra = id(tensor)
    node.grads = {**(known.grads or {} if known is not None else {}), id(tensor): node.seq}
    node.shape, node.dtype = shape_of(grad), grad.dtype
    if known is not None and known.op != "grad":
        node.inputs, node.live_inputs = known.inputs, known.live_inputs
        node.trainable = known.trainable
    node.ref = tracer.map.set(grad, node)


def _caller() -> Any:
    frame: Any = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.endswith(("_mode.py", "overrides.py")):
        frame = frame.f_back
    return frame


def _grad_written(tracer: Tracer, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
    tensor, value = args[0], args[1] if len(args) > 1 else None
    if tracer.here.optimizer and not in_closure(tracer):
        return
    stack = tracer.frames.stack()
    if value is None:
        tracer.grad_event("none", [id(tensor)], "grad.__set__", stack)
        return
    known = tracer.map.get(value)
    put_back = known if before is value and known is not None and known.op == "grad" and known.scalars else None
    if put_back is not None and put_back.scalars[0] != value._version and put_back.generation < tracer.facts.generation:
        tracer.reused("put back", put_back, "grad.__set__", stack, id(tensor))
    frame = _caller()
    user = frame is not None and tracer.frames.is_user(frame.f_code.co_filename)
    sources = sources_of(known) if user else None
    tracer.grad_event("set", [id(tensor)], "grad.__set__", stack, id(value), sources=sources)
    is_gradient(tracer, tensor, value, known, stack)


def _grad_before(tracer: Tracer, args: tuple[Any, ...]) -> Any:
    with torch._C.DisableTorchFunction():
        return args[0].grad if is_leaf(args[0]) else None


_grad_written.before = _grad_before  # type: ignore[attr-defined]


def _read_anew(tracer: Tracer, tensor: Tensor, grad: Tensor, known: Node | None) -> None:
    """Remember the version that the program has seen, and the first reading of the same tensor."""
    node: Node = tracer.map.get(grad)
    node.scalars = (grad._version,)
    if known is None or known.op != "grad" or not known.scalars or known.generation == node.generation:
        return
    first = tracer.first_reads.get(grad)
    if first is None:
        tracer.first_reads.set(grad, known)
    used = tracer.stale.get(grad)
    if used is not None:
        read, stack = used
        tracer.stale.drop(grad)
        tracer.reused("stale", read, "", stack, id(tensor))


def _meets_itself(tracer: Tracer, op: str, tensors: list[Tensor], inputs: list[Node]) -> None:
    """Note an operation whose two operands are one gradient tensor, or the same view of it."""
    one, other = tensors[0], tensors[1]
    grad = one
    if one is not other:
        if one._base is None or one._base is not other._base or one.data_ptr() != other.data_ptr():
            return
        grad = one._base
        if one.shape != other.shape:
            return
    node = tracer.map.get(grad)
    first = tracer.first_reads.get(grad)
    if node is not None and node.op == "grad" and first is not None and isinstance(node.extra, int):
        tracer.reused("same", first, op, tracer.frames.stack(), node.extra)


def _grad_deleted(tracer: Tracer, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
    tracer.grad_event("none", [id(args[0])], "del .grad", tracer.frames.stack())


def _hook_added(*, after: bool) -> Callable[..., Any]:
    def registered(tracer: Tracer, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
        tensor = args[0]
        hook: Any = args[1] if len(args) > 1 else kwargs.get("hook")
        names = ("__code__", "__func__", "func")
        code = hook
        for _ in names:
            code = next((inner for name in names if (inner := getattr(code, name, None)) is not None), code)
        if not isinstance(code, CodeType):
            code = getattr(getattr(type(hook), "__call__", None), "__code__", None)  # noqa: B004
        tracer.facts.hooks.append(HookFacts(id(tensor), tracer.node(tensor), code, after, tracer.frames.stack()))

    return registered


_OF_GRADIENTS = frozenset({"grad.__get__", "grad.__set__", "grad.__delete__"})

HANDLERS: dict[str, Callable[..., Any]] = {
    "_set_grad_enabled": _set_grad_enabled,
    "data.__get__": _looking(_data_read),
    "data.__set__": _looking(_data_written),
    "requires_grad.__set__": _looking(_flag_changed),
    "requires_grad_": _looking(_flag_changed),
    "grad.__get__": _looking(_grad_read),
    "grad.__set__": _looking(_grad_written),
    "grad.__delete__": _looking(_grad_deleted),
    "register_hook": _looking(_hook_added(after=False)),
    "register_post_accumulate_grad_hook": _looking(_hook_added(after=True)),
}
