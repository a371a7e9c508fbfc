"""`straight_through`: the forward of a function that has no useful derivative, the backward of one that has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from gradctl._custom_grad import _arguments as arguments
from gradctl._custom_grad._replace import REPLACE, batched
from gradctl._custom_grad._vehicle import Family, alias, carry, family
from gradctl._errors import UsageError


class Window(Function):
    """The first argument, whose gradient goes to the second where that lies between two bounds."""

    stops = (0,)  # for who traces the program: no gradient is meant for this one of the tensors

    @staticmethod
    def forward(value: Tensor, x: Tensor, low: float, high: float) -> Tensor:
        """Return `value` itself, as a view."""
        return alias(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep `x` where autograd sees it: changed in place before backward, it raises there."""
        _, x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Hand the gradient on where `x` is inside."""
        return None, _inside(ctx, grads[0]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Bring both batches to the front; one that is missing is the same for every sample."""
        value, x = batched(info, in_dims[:2], *args[:2])
        return carry(WINDOW, value, x, *args[2:]), 0


def _inside(ctx: Any, passing: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    # One pass, where comparisons and a product take four and turn inf outside into nan. Its bounds are excluded.
    return torch.ops.aten.hardtanh_backward(passing, x, ctx.low, ctx.high)


def _tangent(ctx: Any, *tangents: Any) -> Any:
    return _inside(ctx, tangents[1])


WINDOW: Family = family(Window, _tangent)


def straight_through(
    quantised: Callable[[Tensor], Tensor] | Tensor,
    x: Tensor,
    *,
    backward: Literal["identity", "clipped"] | Callable[[Tensor], Tensor] = "identity",
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """Return `quantised(x)`, bit for bit, with the gradient of something smoother.

    Args:
        quantised: a function of `x` alone, or its result (which then gets no gradient of its own). Of the shape,
            dtype and device of `x`.
        x: a floating or complex tensor of any shape; the gradient goes here.
        backward: `"identity"`: the gradient passes as it is. `"clipped"`: it is 0 where `x` lies outside of `bounds`
            (ends are inside, and so is nan). A function: it passes through the backward of that function at `x`,
            parameters of the function included.
        bounds: for `"clipped"` only: (low, high), by default (-1, 1).
    Returns:
        A tensor like `x`, which torch refuses to change in place.
    Raises:
        UsageError: `x` or the result is no floating tensor, shapes, dtypes or devices differ, the function changes `x`
            in place or depends on something that requires a gradient, `backward` or `bounds` do not fit.
    Source: Bengio, Léonard and Courville 2013, arXiv:1308.3432, section 4; "clipped" with bounds ±1: Courbariaux et al.
        2016, arXiv:1602.02830, equation 4.
    """
    arguments.differentiable("straight_through", "x", x)
    if bounds is not None and backward != "clipped":
        raise UsageError("straight_through: bounds without backward='clipped'", fix="leave bounds out")
    value: Any = quantised if isinstance(quantised, Tensor) else _quantise(quantised, x)
    arguments.differentiable("straight_through", "quantised", value)
    arguments.same("straight_through", "quantised", value, "x", x)
    if backward == "identity":
        return carry(REPLACE, value, x)
    if backward == "clipped":
        if x.is_complex():
            raise UsageError(
                "straight_through: x is complex, backward='clipped'",
                why="complex numbers lie neither above nor below a bound",
                fix="backward='identity', or a function",
            )
        return carry(WINDOW, value, x, *_bounds(bounds, x.dtype))
    if not callable(backward):
        raise UsageError(f"straight_through: backward={backward!r}", fix="'identity', 'clipped' or a function")
    surrogate = backward(x)
    arguments.differentiable("straight_through", "backward(x)", surrogate)
    arguments.same("straight_through", "quantised", value, "backward(x)", surrogate)
    return carry(REPLACE, value, surrogate)


def _quantise(quantised: Any, x: Tensor) -> Any:
    if not callable(quantised):
        raise UsageError(
            f"straight_through: the first argument is of type {type(quantised).__name__}",
            fix="a function of x, or a tensor; x comes second",
        )
    watched = not torch.compiler.is_compiling() and not x.is_inference()
    before = x._version if watched else 0
    value = quantised(x.detach())
    if watched and x._version != before:
        raise UsageError(
            f"straight_through: {_name(quantised)} changed x in place",
            why="x is used further with the value that it had",
            fix=f"the form that returns a new tensor, for example torch.{_name(quantised).rstrip('_')}",
        )
    if isinstance(value, Tensor) and value.requires_grad:
        raise UsageError(
            f"straight_through: {_name(quantised)} depends on something that requires a gradient, which would be lost",
            why="the gradient goes to x alone",
            fix="compute the value first and pass it, if the loss is meant; else gradctl.stop what it depends on",
        )
    return value


def _bounds(bounds: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest number of `dtype` below the lower bound, and the smallest above the upper one."""
    if bounds is None:
        return _ONE[dtype] if dtype in _ONE else (-_above(1.0, dtype), _above(1.0, dtype))
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise UsageError(f"straight_through: bounds={bounds!r}", fix="two numbers: (low, high)")
    low, high = (float(bound) for bound in bounds)
    if not low < high:
        raise UsageError(f"straight_through: bounds={bounds!r} hold nothing", fix="(low, high) with low below high")
    return -_above(-low, dtype), _above(high, dtype)


def _above(bound: float, dtype: torch.dtype) -> float:
    """Round `bound` to `dtype`, and return the next number of that dtype above it."""
    if dtype == torch.float64 or math.isinf(bound):
        return math.nextafter(bound, math.inf)
    limits = torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    step = max(limits.eps * 2.0 ** (math.frexp(bound)[1] - 1), least)
    rounded = round(bound / step) * step if bound else 0.0
    mantissa, exponent = math.frexp(rounded)
    if rounded == 0:
        return least
    step = limits.eps * 2.0 ** (exponent - 1)
    if mantissa == -0.5:  # towards zero from a power of two numbers lie twice as dense
        step /= 2
    return rounded + max(step, least)


_ONE = {
    dtype: (-_above(1.0, dtype), _above(1.0, dtype))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__
