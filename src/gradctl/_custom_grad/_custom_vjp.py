"""`custom_vjp`: a function and its backward, as two plain functions."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gradctl._custom_grad._pack import pack, pack_arguments
from gradctl._custom_grad._vehicle import transforms_active
from gradctl._custom_grad._vjp_call import Rule, apply, begin
from gradctl._errors import UsageError, WrongGradient
from gradctl._finite_difference import mismatches

Residuals = Literal["inputs", "returned"]
SecondOrder = Literal["refuse", "differentiate"]


@overload
def custom_vjp(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    residuals: Residuals = "inputs",
    check: bool = False,
    second_order: SecondOrder = "refuse",
) -> CustomVjp: ...
@overload
def custom_vjp(
    forward: None = None,
    backward: Callable[..., Any] | None = None,
    *,
    residuals: Residuals = "inputs",
    check: bool = False,
    second_order: SecondOrder = "refuse",
) -> Callable[[Callable[..., Any]], CustomVjp]: ...
def custom_vjp(
    forward: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    *,
    residuals: Residuals = "inputs",
    check: bool = False,
    second_order: SecondOrder = "refuse",
) -> CustomVjp | Callable[[Callable[..., Any]], CustomVjp]:
    """Return `forward` with `backward` in the place of its derivative.

    Two forms, by `residuals`:

    - `"inputs"`: `forward(*inputs) -> out` and `backward(inputs, out, grad) -> grads`, where `inputs` is a tuple. All
      inputs and the output are kept for backward.
    - `"returned"`: `forward(*inputs) -> (out, residuals)` and `backward(residuals, grad) -> grads`. What forward
      returns as residuals is kept, and nothing else.

    `out`, each input and the residuals may be nested tuples, lists and dicts; `grad` is nested as `out` is. `grads` is
    a tuple with one gradient an argument (defaults included), nested as that argument is, None for one that is no
    tensor; for one argument the gradient alone will do. What torch would sum, cast or skip in silence raises, by the
    name of the argument.

    A call records nothing of what forward does, and backward runs under the autocast of forward. Under `torch.func` and
    `torch.compile` it works as in eager mode; there is no forward mode.

    Without `forward` the result is a decorator: `@gradctl.custom_vjp(backward=softplus_backward)`.

    Args:
        forward: a function of tensors and other values, without keyword-only arguments; it must not change an argument.
        backward: a function as above. It gets tensors, and returns gradients of the shapes, dtypes and devices of the
            inputs; under autocast those of float32 inputs may come in the autocast dtype.
        residuals: what backward is given.
        check: compare with finite differences in float64 at the first eager call that needs a gradient; with
            `second_order="differentiate"` the second derivative too. It runs forward and backward some dozen times.
        second_order: what happens when the gradient is differentiated: it raises NoSecondDerivative, or autograd
            differentiates `backward`, which then must be written in differentiable operations of torch. Residuals that
            are neither inputs nor outputs are computed again for that, with their graph, which keeps the inputs.
    Returns:
        The function. Its call raises BadVjp, WrongGradient, NoSecondDerivative or UsageError as said here.
    Raises:
        UsageError: an argument does not fit.
    Source: `jax.custom_vjp` (the residual form). Differs: what comes back is checked, and a second derivative is right
        or refused.
    """
    if forward is None:
        if backward is None:
            raise UsageError("custom_vjp: backward is missing", fix="custom_vjp(forward, backward)")
        return functools.partial(
            _with_backward, backward=backward, residuals=residuals, check=check, second_order=second_order
        )
    return _with_backward(forward, backward=backward, residuals=residuals, check=check, second_order=second_order)


def _with_backward(forward: Any, *, backward: Any, residuals: Any, check: bool, second_order: Any) -> CustomVjp:
    for name, given in (("forward", forward), ("backward", backward)):
        if not callable(given):
            raise UsageError(f"custom_vjp: {name} is of type {type(given).__name__}, not a function", fix="a function")
    for name, given, allowed in (
        ("residuals", residuals, ("inputs", "returned")),
        ("second_order", second_order, ("refuse", "differentiate")),
    ):
        if given not in allowed:
            raise UsageError(f"custom_vjp: {name}={given!r}", fix=" or ".join(repr(word) for word in allowed))
    return CustomVjp(forward, backward, residuals=residuals, check=check, second_order=second_order)


class CustomVjp:
    """A function with a backward given by hand; made by `custom_vjp`, called like the function.

    Args:
        forward: the function.
        backward: its backward.
        residuals: what backward is given.
        check: compare with finite differences at the first call.
        second_order: what happens when the gradient is differentiated.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        *,
        residuals: Residuals,
        check: bool,
        second_order: SecondOrder,
    ) -> None:
        functools.update_wrapper(self, forward)
        name = getattr(forward, "__name__", type(forward).__name__)
        self._rule = Rule(name, forward, backward, residuals, second_order)
        self._signature = _signature(name, forward)
        parameters = self._signature.parameters.values()
        self._open = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        self._names = tuple(
            parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL
        )
        self._unchecked = check
        self._unwatched = True

    def __repr__(self) -> str:
        return f"<custom_vjp of {self._rule.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        if kwargs or len(args) != len(self._names):
            args = self._bound(args, kwargs)
        arguments = pack_arguments(args)
        names = self._names
        if len(args) > len(names):
            last = list(self._signature.parameters)[len(names)]
            names = (*names, *(f"{last}[{number}]" for number in range(len(args) - len(names))))
        call = begin(self._rule, names, arguments)
        watch = False
        if (self._unwatched or self._unchecked) and not torch.compiler.is_compiling():
            needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments.tensors)
            watch = needed and not transforms_active()
            if watch and self._unchecked:
                self._check(args, names)
        out = apply(call, arguments, watch)
        if watch:
            self._unwatched = False
        return out

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        bound = self._signature.bind(*args, **kwargs)  # a TypeError as of any Python function
        bound.apply_defaults()
        return bound.args

    def _check(self, args: tuple[Any, ...], names: tuple[str, ...]) -> None:
        self._unchecked = False
        rule = self._rule
        plain = CustomVjp(
            rule.forward, rule.backward, residuals=rule.residuals, check=False, second_order=rule.second_order
        )
        for order in (1, 2) if rule.second_order == "differentiate" else (1,):
            try:
                found = _found(plain, args, names, order)
            except BaseException:
                self._unchecked = True
                raise
            if found:
                self._unchecked = True
                raise WrongGradient(
                    f"custom_vjp({rule.name}): {found[0]}",
                    what="; ".join(str(mismatch) for mismatch in found[1:]) or None,
                    why=f"backward {'differentiated ' if order == 2 else ''}is not the derivative of forward",
                    fix="correct backward; leave check out where the gradient is meant to be another",
                )


def _found(plain: CustomVjp, args: tuple[Any, ...], names: tuple[str, ...], order: int) -> list[Any]:
    def as_it_is(tensor: Tensor) -> Tensor:
        return tensor

    kinds = {tensor.device.type for tensor in pack(args).tensors}
    # Hooks of a checkpoint around the call would count what is saved here, and miss it when they run it again.
    hooks = torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is)
    with torch.enable_grad(), hooks, _without_autocast(kinds | {"cpu"}):
        return list(mismatches(plain, args, names=names, order=order))


def _without_autocast(kinds: set[str]) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for kind in sorted(kinds):
        try:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        except RuntimeError:
            continue  # a device without autocast
    return stack


def _signature(name: str, forward: Callable[..., Any]) -> inspect.Signature:
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"custom_vjp({name}): its arguments cannot be read",
            why="a function of C has no signature that Python can see",
            fix=f"lambda x: {name}(x), with the arguments by name",
        ) from error
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            raise UsageError(
                f"custom_vjp({name}): forward has the keyword-only argument {parameter.name}",
                why="gradients come back by position",
                fix="a plain argument; its default is kept",
            )
    return signature
