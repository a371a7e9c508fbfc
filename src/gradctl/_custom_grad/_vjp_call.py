"""One call of a function with a backward given by hand: the two autograd.Functions that carry it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from gradctl._custom_grad import _second_order as second
from gradctl._custom_grad._captured import captured
from gradctl._custom_grad._pack import Layout, Nest, pack, unpack
from gradctl._custom_grad._returned import Expected, expect, returned
from gradctl._custom_grad._vehicle import Family, carry_none, family, no_forward_mode, transforms_active
from gradctl._errors import UsageError

Source = tuple[Literal["input", "output", "own"], int]


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
class Call:
    """What backward has to know of one forward, tensors apart.

    Args:
        rule: what was called.
        expected: what the gradients must look like.
        autocast: device type and dtype of autocast in forward; the dtype is None where it was off, and all of it None
            where nobody has to put it back.
        out: how the results are nested.
        residuals: how the residuals are nested; None in the plain form.
        sources: where each residual is kept: it is an input, an output or one of its own.
        differentiable: which outputs can have a gradient.
    """

    rule: Rule
    expected: Expected
    autocast: tuple[str, torch.dtype | None] | None
    out: Any = None
    residuals: Any = None
    sources: tuple[Source, ...] = ()
    differentiable: tuple[bool, ...] = ()

    @property
    def recomputes(self) -> bool:
        """Whether a derivative of the backward needs a second forward: some residual is neither input nor output."""
        return self.rule.second_order == "differentiate" and any(kind == "own" for kind, _ in self.sources)

    def kept(self, kind: str) -> list[int]:
        """Return which inputs or outputs backward needs, in order."""
        return sorted({number for source, number in self.sources if source == kind})


@dataclass(frozen=True, slots=True)
class Saved:
    """The tensors of a call in backward: inputs and outputs by number, residuals of their own, links to the inputs."""

    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]
    own: Sequence[Tensor]
    links: Sequence[Tensor]


def begin(rule: Rule, parameters: tuple[str, ...], arguments: Nest) -> Call:
    """Note what a call is made of, before its forward."""
    if torch.compiler.is_compiling() or not arguments.tensors:
        # Inductor and AOTAutograd run backward under the autocast of forward by themselves.
        return Call(rule, expect(rule.name, parameters, arguments, _autocast_dtype("cpu")), None)
    kind = arguments.tensors[0].device.type
    dtype = _autocast_dtype(kind)
    return Call(rule, expect(rule.name, parameters, arguments, dtype), (kind, dtype))


def _autocast_dtype(kind: str) -> torch.dtype | None:
    try:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    except RuntimeError:
        return None  # a device without autocast


# -- forward ----------------------------------------------------------------------------------------------------------


def run(call: Call, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run forward, and sort its results into outputs and residuals of their own.

    Raises:
        UsageError: forward changed an argument in place, or did not return (out, residuals).
    """
    rule = call.rule
    versions = _versions(tensors)
    result = rule.forward(*unpack(tensors, call.expected.layout))
    if versions is not None and _versions(tensors) != versions:
        changed = [
            name
            for name, t, before in zip(call.expected.names(), tensors, versions, strict=True)
            if t._version != before
        ]
        raise UsageError(
            f"custom_vjp({rule.name}): forward changed {changed[0]} in place",
            why="whoever else uses it would see the new value with the gradient of the old one",
            fix=f"work on a copy: {changed[0]}.clone()",
        )
    if rule.residuals == "inputs":
        out = pack(result)
        call.sources = (
            *(("input", number) for number in range(len(tensors))),
            *(("output", number) for number in range(len(out.tensors))),
        )
        own: list[Tensor] = []
    else:
        if not isinstance(result, tuple) or len(result) != 2:
            got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
            raise UsageError(
                f"custom_vjp({rule.name}): forward returned {got}",
                why="with residuals='returned' it returns two things: what the caller gets, and what backward needs",
                fix="return out, (x, y, …)",
            )
        out, kept = pack(result[0]), pack(result[1])
        _nothing_hidden(call, kept)
        call.residuals = kept.layout
        own = []
        sources: list[Source] = []
        for residual in kept.tensors:
            sources.append(_source(residual, tensors, out.tensors, own))
            if sources[-1] == ("own", len(own)):
                own.append(residual)
        call.sources = tuple(sources)
    if not out.tensors:
        raise UsageError(
            f"custom_vjp({rule.name}): forward returned no tensor", fix="return a tensor, or a nest that holds one"
        )
    call.out = out.layout
    call.differentiable = tuple(t.is_floating_point() or t.is_complex() for t in out.tensors)
    outputs: list[Tensor] = []
    for tensor in out.tensors:  # torch gives one tensor that is returned twice one gradient only
        outputs.append(tensor.view_as(tensor) if any(tensor is one for one in outputs) else tensor)
    return outputs, own


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    if torch.compiler.is_compiling():
        return None
    try:
        return tuple([tensor._version for tensor in tensors])
    except RuntimeError:
        return None  # tensors of inference mode keep none


def _source(residual: Tensor, inputs: Sequence[Tensor], outputs: Sequence[Tensor], own: Sequence[Tensor]) -> Source:
    for number, tensor in enumerate(inputs):
        if residual is tensor:
            return ("input", number)
    for number, tensor in enumerate(outputs):
        if residual is tensor:
            return ("output", number)
    return ("own", len(own))


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
    learnt = [result for result in results if result.requires_grad]
    if learnt:
        name = "a tensor" if torch.compiler.is_compiling() else captured(call.rule.forward, learnt)
        raise UsageError(
            f"custom_vjp({call.rule.name}): forward reads {name}, which requires a gradient and would get none",
            why="backward returns gradients of the arguments only",
            fix="pass it as an argument; gradctl.stop it where no gradient is meant",
        )


# -- backward ---------------------------------------------------------------------------------------------------------


def spread(call: Call, saved: Saved, grads: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradient of each input tensor: run the backward that was given, and check what it returns."""
    grad = unpack([g if has else None for g, has in zip(grads, call.differentiable, strict=True)], call.out)
    with _as_in_forward(call):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return returned(call.expected, _given(call, saved, grad), needed)
        if call.rule.second_order == "differentiate":
            own = _recorded(call, saved) if call.recomputes else saved.own
            return returned(call.expected, _given(call, Saved(saved.inputs, saved.outputs, own, ()), grad), needed)
        with torch.no_grad():
            found = returned(call.expected, _given(call, saved, grad), needed)
    links = [*saved.links, *saved.inputs.values(), *saved.outputs.values(), *grads]
    return [None if one is None else second.refuse(call.rule.name, one, links) for one in found]


def _given(call: Call, saved: Saved, grad: Any) -> Any:
    if call.rule.residuals == "inputs":
        inputs = unpack([saved.inputs[number] for number in sorted(saved.inputs)], call.expected.layout)
        out = unpack([saved.outputs[number] for number in sorted(saved.outputs)], call.out)
        return call.rule.backward(inputs, out, grad)
    homes = {"input": saved.inputs, "output": saved.outputs, "own": saved.own}
    return call.rule.backward(unpack([homes[kind][number] for kind, number in call.sources], call.residuals), grad)


def _recorded(call: Call, saved: Saved) -> list[Tensor]:
    """Run forward again with the graph on, so that the residuals hang on the inputs."""
    inputs = [saved.inputs[number] for number in sorted(saved.inputs)]
    again = Call(call.rule, call.expected, call.autocast)
    random = torch.get_rng_state()
    _, own = run(again, inputs)
    if transforms_active() and not torch.equal(torch.get_rng_state(), random):
        raise second.not_repeated(call.rule.name)
    if len(own) != len(saved.own):
        raise second.not_repeated(call.rule.name)
    second.repeated(call.rule.name, saved.own, own)
    return own


def _as_in_forward(call: Call) -> contextlib.AbstractContextManager[Any]:
    """Put the autocast of forward back: what it cast there has to be cast here."""
    if call.autocast is None:
        return contextlib.nullcontext()
    kind, dtype = call.autocast
    if _autocast_dtype(kind) is dtype:
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


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
            aliases = [tensor.detach() for tensor in tensors]
            with torch.enable_grad():
                outputs, own = run(call, aliases)
            refuse_captured(call, [*outputs, *own])
            outputs = [
                next((tensor for tensor, one in zip(tensors, aliases, strict=True) if one is out), out)
                for out in outputs
            ]
        else:
            outputs, own = run(call, tensors)
        inputs = range(len(tensors)) if call.recomputes else call.kept("input")
        ctx.call, ctx.inputs = call, inputs
        ctx.save_for_backward(*[tensors[n] for n in inputs], *[outputs[n] for n in call.kept("output")], *own)
        ctx.links = ()
        if call.rule.second_order == "refuse":
            ctx.links = tuple([second.edge(t) for n, t in enumerate(tensors) if t.requires_grad and n not in inputs])
        if not all(call.differentiable):
            ctx.mark_non_differentiable(
                *[out for out, has in zip(outputs, call.differentiable, strict=True) if not has]
            )
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Run the backward that was given."""
        call, saved = ctx.call, ctx.saved_tensors
        kept = call.kept("output")
        start, stop = len(ctx.inputs), len(ctx.inputs) + len(kept)
        tensors = Saved(
            dict(zip(ctx.inputs, saved[:start], strict=True)),
            dict(zip(kept, saved[start:stop], strict=True)),
            saved[stop:],
            ctx.links,
        )
        return None, None, *spread(call, tensors, grads, ctx.needs_input_grad[2:])

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
        """Save outputs, inputs and residuals."""
        ctx.call = inputs[0]
        count = len(ctx.call.differentiable)
        ctx.save_for_backward(*output, *inputs[1 + count :])
        if not all(ctx.call.differentiable):
            pairs = zip(output, ctx.call.differentiable, strict=True)
            ctx.mark_non_differentiable(*[out for out, has in pairs if not has])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Run the backward that was given."""
        call, saved = ctx.call, ctx.saved_tensors
        count, inputs = len(call.differentiable), len(call.expected.like)
        tensors = Saved(
            dict(enumerate(saved[count : count + inputs])),
            dict(enumerate(saved[:count])),
            saved[count + inputs :],
            (),
        )
        found = spread(call, tensors, grads, ctx.needs_input_grad[1 + count : 1 + count + inputs])
        return None, *[None] * count, *found, *[None] * (len(saved) - count - inputs)


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
        outputs, own = run(call, constants)
        refuse_captured(call, [*outputs, *own])
        found = carry_none(ATTACH, call, *outputs, *arguments.tensors, *own)
    else:
        found = INSIDE[call.rule.name].apply(call, watch, *arguments.tensors)
    return unpack(found if isinstance(found, tuple) else (found,), call.out)
