"""One call of a function with a backward given by hand: the two autograd.Functions that carry it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd import Function

from gradctl import _torch_private as private
from gradctl._custom_grad import _second_order as second
from gradctl._custom_grad._captured import captured
from gradctl._custom_grad._pack import Layout, Nest, pack, unpack
from gradctl._custom_grad._returned import Expected, returned
from gradctl._custom_grad._vehicle import Family, carry_none, family, no_forward_mode, transforms_active
from gradctl._errors import UsageError

_wrapped = private.find("transform_wrapped")
_unwrap = private.find("transform_unwrap")


@dataclass(frozen=True, slots=True)
class Rule:
    """A function and its backward.

    Args:
        name: of the function, for messages.
        forward: the function; with `returned` residuals it returns (out, residuals).
        backward: takes (inputs, out, grad), or (residuals, grad) with `returned` residuals.
        residuals: what backward is given.
        second_order: whether backward may be differentiated.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    residuals: Literal["inputs", "returned"]
    second_order: Literal["refuse", "differentiate"]


@dataclass(slots=True)
class Call(Expected):
    """What backward has to know of one forward, tensors apart.

    Saved for backward are, in this order: the inputs of these numbers, the outputs of these numbers, and the residuals
    that are neither.

    Args:
        rule: what was called.
        device_type: of the autocast that has to be put back in backward; None where nobody has to.
        out: how the results are nested.
        differentiable: which outputs can have a gradient.
        inputs: the inputs that are saved.
        outputs: the outputs that are saved.
        residuals: how the residuals are nested; None in the plain form.
        places: where each residual stands among what is saved.
        links: an empty tensor for each input that requires a gradient and is not saved: it hangs on the input in the
            graph, and does not keep its memory alive.
    """

    rule: Rule
    device_type: str | None
    out: Any = None
    differentiable: Sequence[bool] = ()
    inputs: Sequence[int] = ()
    outputs: Sequence[int] = ()
    residuals: Any = None
    places: Sequence[int] = ()
    links: Sequence[Tensor] = ()


def begin(rule: Rule, parameters: tuple[str, ...], arguments: Nest) -> Call:
    """Note what a call is made of, before its forward."""
    tensors = arguments.tensors
    like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
    kind = tensors[0].device.type if tensors else "cpu"
    # AOTAutograd runs backward under the autocast of forward by itself.
    restored = None if torch.compiler.is_compiling() else kind
    return Call(rule.name, parameters, arguments.layout, like, _autocast_dtype(kind), rule, restored)


def _autocast_dtype(kind: str) -> torch.dtype | None:
    try:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    except RuntimeError:
        return None  # a device without autocast


# -- forward ----------------------------------------------------------------------------------------------------------


def run(call: Call, tensors: Sequence[Tensor], keep_inputs: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Run forward, and sort its results into outputs and residuals of their own.

    Raises:
        UsageError: forward changed an argument in place, or did not return what its form asks for.
    """
    rule = call.rule
    versions = _versions(tensors)
    result = rule.forward(*unpack(tensors, call.layout))
    if versions is not None and _versions(tensors) != versions:
        raise _changed(call, tensors, versions)
    kept = None
    if rule.residuals == "returned":
        if not isinstance(result, tuple) or len(result) != 2:
            got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
            raise UsageError(
                f"custom_vjp({rule.name}): forward returned {got}",
                why="with residuals='returned' it returns two things: what the caller gets, and what backward needs",
                fix="return out, (x, y, …)",
            )
        result, kept = result[0], pack(result[1])
        _nothing_hidden(call, kept)
    out = pack(result)
    outputs = list(out.tensors)
    if not outputs:
        raise UsageError(
            f"custom_vjp({rule.name}): forward returned no tensor", fix="return a tensor, or a nest that holds one"
        )
    call.out = out.layout
    call.differentiable = [tensor.is_floating_point() or tensor.is_complex() for tensor in outputs]
    own: list[Tensor] = []
    if kept is None:
        call.inputs, call.outputs = range(len(tensors)), range(len(outputs))
    else:
        own = _sort(call, kept, tensors, outputs, keep_inputs)
    for number in range(1, len(outputs)):  # torch gives a tensor that is returned twice one gradient only
        if any(outputs[number] is before for before in outputs[:number]):
            outputs[number] = outputs[number].view_as(outputs[number])
    return outputs, own


def _sort(
    call: Call, kept: Nest, inputs: Sequence[Tensor], outputs: Sequence[Tensor], keep_inputs: bool
) -> list[Tensor]:
    """Say where each residual is saved: as the input or output that it is, to keep its graph, or on its own."""
    own: list[Tensor] = []
    found: list[int] = []
    for residual in kept.tensors:
        at = _index(residual, inputs)
        if at < 0:
            at = _index(residual, outputs)
            at = len(inputs) + at if at >= 0 else at
        if at < 0:
            at = _index(residual, own)
            if at < 0:
                at = len(own)
                own.append(residual)
            at += len(inputs) + len(outputs)
        found.append(at)
    keep_inputs = keep_inputs or (len(own) > 0 and call.rule.second_order == "differentiate")
    plan = _planned if torch.compiler.is_compiling() else _remembered
    call.inputs, call.outputs, call.places = plan(tuple(found), len(inputs), len(outputs), keep_inputs)
    call.residuals = kept.layout
    return own


def _index(tensor: Tensor, among: Sequence[Tensor]) -> int:
    for number, one in enumerate(among):
        if one is tensor:
            return number
    return -1


def _planned(
    found: tuple[int, ...], inputs: int, outputs: int, keep_inputs: bool
) -> tuple[list[int], list[int], list[int]]:
    """Return which inputs and outputs are saved, and where each residual then stands.

    Args:
        found: of each residual, where it stands among all inputs, all outputs and its own kind.
        inputs: how many inputs there are.
        outputs: how many outputs there are.
        keep_inputs: save every input.
    """
    used = sorted(set(found))
    own = [at for at in used if at >= inputs + outputs]
    kept = list(range(inputs)) if keep_inputs else [at for at in used if at < inputs]
    saved = kept + [at for at in used if inputs <= at < inputs + outputs] + own
    return kept, [at - inputs for at in used if inputs <= at < inputs + outputs], [saved.index(at) for at in found]


_remembered = functools.cache(_planned)


def _changed(call: Call, tensors: Sequence[Tensor], versions: tuple[int, ...]) -> UsageError:
    pairs = zip(call.names(), tensors, versions, strict=True)
    name = next(name for name, tensor, before in pairs if tensor._version != before)
    return UsageError(
        f"custom_vjp({call.call}): forward changed {name} in place",
        why="whoever else uses it would see the new value with the gradient of the old one",
        fix=f"work on a copy: {name}.clone()",
    )


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    if torch.compiler.is_compiling():
        return None
    try:
        return tuple([tensor._version for tensor in tensors])
    except RuntimeError:
        return None  # tensors of inference mode keep none


def _nothing_hidden(call: Call, kept: Nest) -> None:
    if not isinstance(kept.layout, Layout):
        return
    for value in kept.layout.others:
        held = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
        if any(isinstance(item, Tensor) for item in held) and not callable(value):
            raise UsageError(
                f"custom_vjp({call.rule.name}): a residual of type {type(value).__name__} hides a tensor",
                why="autograd would not see it changed in place, and saved-tensor hooks would not reach it",
                fix="a tuple, list, dict or named tuple of tensors as residuals",
            )


def refuse_captured(call: Call, results: Sequence[Tensor]) -> None:
    """Refuse what forward read from around itself and that requires a gradient, which nobody would give it.

    Raises:
        UsageError: naming it.
    """
    if not torch.compiler.is_compiling():
        results = [_recorded_below(result) for result in results]
    learnt = [result for result in results if result.requires_grad]
    if learnt:
        name = "a tensor" if torch.compiler.is_compiling() else captured(call.rule.forward, learnt)
        raise UsageError(
            f"custom_vjp({call.rule.name}): forward reads {name}, which requires a gradient and would get none",
            why="backward returns gradients of the arguments only",
            fix="pass it as an argument; gradctl.stop it where no gradient is meant",
        )


def _recorded_below(result: Tensor) -> Tensor:
    """Return the tensor inside of the wrappers of torch.func that requires a gradient, if one does."""
    while not result.requires_grad and _unwrap and _wrapped and transforms_active() and _wrapped(result):
        result = _unwrap(result)
    return result


# -- backward ---------------------------------------------------------------------------------------------------------


def spread(call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradient of each input tensor: run the backward that was given, and check what it returns."""
    kind = call.device_type
    if kind is None or _autocast_dtype(kind) is call.autocast_dtype:
        return _checked(call, saved, grads, needed)
    # What autocast cast in forward has to be cast here.
    with torch.autocast(kind, dtype=call.autocast_dtype, enabled=call.autocast_dtype is not None):
        return _checked(call, saved, grads, needed)


def _checked(
    call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return returned(call, _given(call, saved, grads), needed)
    if call.rule.second_order == "differentiate":
        own = len(saved) - len(call.inputs) - len(call.outputs)
        if own:
            saved = _recorded(call, saved, own)
        return returned(call, _given(call, saved, grads), needed)
    with torch.no_grad():
        found = returned(call, _given(call, saved, grads), needed)
    links = [*call.links, *saved, *grads]
    return [None if one is None else second.refuse(call.call, one, links) for one in found]


def _given(call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor]) -> Any:
    if not all(call.differentiable):
        grads = cast(Any, [g if has else None for g, has in zip(grads, call.differentiable, strict=True)])
    grad = unpack(grads, call.out)
    if call.rule.residuals == "inputs":
        count = len(call.inputs)
        return call.rule.backward(unpack(saved[:count], call.layout), unpack(saved[count:], call.out), grad)
    return call.rule.backward(unpack([saved[place] for place in call.places], call.residuals), grad)


def _recorded(call: Call, saved: Sequence[Tensor], count: int) -> list[Tensor]:
    """Run forward again with the graph on, so that the residuals hang on the inputs."""
    inputs = saved[: len(call.inputs)]
    again = Call(call.call, call.parameters, call.layout, call.like, call.autocast_dtype, call.rule, call.device_type)
    random = torch.get_rng_state()
    _, own = run(again, inputs, keep_inputs=True)
    drew = transforms_active() and not torch.equal(torch.get_rng_state(), random)
    if drew or len(own) != count:
        raise second.not_repeated(call.call)
    second.repeated(call.call, saved[-count:], own)
    return [*saved[:-count], *own]


# -- the two Functions ------------------------------------------------------------------------------------------------


class _Names(dict[str, type[Function]]):
    """One eager Function a name, so that the graph says `softplusBackward`."""

    def __missing__(self, name: str) -> type[Function]:
        self[name] = made = type(name if name.isidentifier() else "custom_vjp", (Inside,), {})
        return made


class Inside(Function):
    """Eager: forward runs inside, so nothing of it is recorded, and its result may be changed in place."""

    @staticmethod
    def forward(ctx: Any, call: Call, watch: bool, *tensors: Tensor) -> Any:
        """Run forward, and save what backward needs where autograd, hooks and version counters see it."""
        if watch:
            outputs, own = _watched(call, tensors)
        else:
            outputs, own = run(call, tensors, keep_inputs=False)
        ctx.call = call
        ctx.save_for_backward(*[tensors[n] for n in call.inputs], *[outputs[n] for n in call.outputs], *own)
        _mark(ctx, call, outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Run the backward that was given."""
        found = spread(ctx.call, ctx.saved_tensors, grads, ctx.needs_input_grad[2:])
        return None, None, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse."""
        return _no_tangent(ctx.call.rule.name)(ctx)


class Attach(Function):
    """Transformed and compiled: forward has run outside, on constants; this hangs its backward on the result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> Any:
        """Return the outputs themselves, as views."""
        return tuple([tensor.view_as(tensor) for tensor in tensors[: len(call.differentiable)]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save inputs, outputs and residuals."""
        call = ctx.call = inputs[0]
        outs = len(call.differentiable)
        given, own = inputs[1 + outs : 1 + outs + len(call.like)], inputs[1 + outs + len(call.like) :]
        ctx.save_for_backward(*[given[n] for n in call.inputs], *[output[n] for n in call.outputs], *own)
        ctx.own = len(own)
        _mark(ctx, call, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Run the backward that was given."""
        call = ctx.call
        outs = len(call.differentiable)
        needed = ctx.needs_input_grad[1 + outs : 1 + outs + len(call.like)]
        return None, *[None] * outs, *spread(call, ctx.saved_tensors, grads, needed), *[None] * ctx.own


def _mark(ctx: Any, call: Call, outputs: Sequence[Tensor]) -> None:
    if not all(call.differentiable):
        pairs = zip(outputs, call.differentiable, strict=True)
        ctx.mark_non_differentiable(*[out for out, has in pairs if not has])


def _watched(call: Call, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run forward with the graph on and on constants: what it records comes from around the function."""
    constants = [tensor.detach() for tensor in tensors]
    with torch.enable_grad():
        outputs, own = run(call, constants, keep_inputs=False)
    refuse_captured(call, [*outputs, *own])
    pairs = list(zip(constants, tensors, strict=True))
    return [next((tensor for constant, tensor in pairs if constant is out), out) for out in outputs], own


def _no_tangent(name: str) -> Callable[..., Any]:
    return no_forward_mode(f"custom_vjp({name})", "only a backward was given")


def _refuse_tangent(ctx: Any, *tangents: Any) -> Any:
    return _no_tangent(ctx.call.rule.name)(ctx)


ATTACH: Family = family(Attach, _refuse_tangent)
INSIDE = _Names()


def apply(call: Call, arguments: Nest, watch: bool) -> Any:
    """Call the function, with its backward hung on what it returns."""
    if torch.compiler.is_compiling() or transforms_active():
        constants = [tensor.detach() for tensor in arguments.tensors]
        outputs, own = run(call, constants, keep_inputs=call.rule.second_order == "refuse")
        refuse_captured(call, [*outputs, *own])
        found = carry_none(ATTACH, call, *outputs, *arguments.tensors, *own)
    else:
        found = INSIDE[call.call].apply(call, watch, *arguments.tensors)
        if len(call.inputs) < len(call.like) and call.rule.second_order == "refuse" and torch.is_grad_enabled():
            tensors = enumerate(arguments.tensors)
            call.links = [second.edge(t) for n, t in tensors if t.requires_grad and n not in call.inputs]
    return unpack(found if isinstance(found, tuple) else (found,), call.out)
