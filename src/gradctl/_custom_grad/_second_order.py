"""What a gradient from a backward given by hand answers when it is differentiated: right, or a refusal by name.

torch says nothing here: a residual that is neither input nor output is a constant to it, so the derivative of the
backward loses the terms that go through it (x·eˣ: 5.44 for 8.15), and `once_differentiable` guards the way through the
incoming gradient only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gradctl._custom_grad._vehicle import Family, alias, carry, family, transforms_active
from gradctl._errors import NoSecondDerivative


class Refuse(Function):
    """A gradient that hangs on all that it may depend on, and raises when it is differentiated."""

    @staticmethod
    def forward(grad: Tensor, call: str, *links: Tensor) -> Tensor:
        """Return the gradient itself, as a view."""
        return alias(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the name."""
        ctx.call = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Raise."""
        raise no_second(ctx.call)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Keep the links; where their batch lies does not matter to a refusal."""
        grad, call, *links = args
        if in_dims[0] is None:
            grad = grad.expand(info.batch_size, *grad.shape)
        return carry(REFUSE, grad, call, *links), in_dims[0] or 0


def _no_tangent(ctx: Any, *tangents: Any) -> Any:
    raise no_second(ctx.call)


REFUSE: Family = family(Refuse, _no_tangent)


def no_second(call: str) -> NoSecondDerivative:
    """Say that the gradient of this call has no derivative."""
    return NoSecondDerivative(
        f"custom_vjp({call}): its gradient was differentiated",
        why="a backward given by hand is not differentiated unless it says that it may be",
        fix="custom_vjp(…, second_order='differentiate'), and gradctl.check(…, order=2) once",
    )


def refuse(call: str, grad: Tensor, links: Sequence[Tensor]) -> Tensor:
    """Return `grad`, whose derivative with respect to anything behind `links` raises."""
    return carry(REFUSE, grad, call, *links)


def edge(x: Tensor) -> Tensor:
    """Return an empty tensor that hangs on `x` in the graph, and does not keep its memory alive."""
    return (x if x.dim() else x.reshape(1)).narrow_copy(0, 0, 0)


def repeated(call: str, before: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    """Make sure that a second forward gave the residuals that the first one gave.

    Raises:
        NoSecondDerivative: they differ, so forward is not deterministic.
    """
    if transforms_active():
        return  # the values inside of a transform cannot be looked at; the random state is, by the caller
    for one, other in zip(before, again, strict=True):
        same = one.shape == other.shape and one.dtype is other.dtype
        if not same or not (torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)):
            raise not_repeated(call)


def not_repeated(call: str) -> NoSecondDerivative:
    """Say that a second forward gave other residuals."""
    return NoSecondDerivative(
        f"custom_vjp({call}): a second run of forward gave other residuals",
        what="its gradient is differentiated, so forward ran again to record how the residuals depend on the inputs",
        why="forward is not deterministic: it draws random numbers, or changes something outside",
        fix="draw outside and pass the result as an argument",
    )
