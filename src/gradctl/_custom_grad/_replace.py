"""`replace`: the value of one tensor, the gradient of another."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from gradctl._custom_grad import _arguments as arguments
from gradctl._custom_grad._vehicle import Family, alias, carry, family


class Replace(Function):
    """The first argument, whose gradient goes to the second."""

    stops = (0,)  # for who traces the program: no gradient is meant for this one of the tensors

    @staticmethod
    def forward(value: Tensor, gradient_of: Tensor) -> Tensor:
        """Return `value` itself, as a view."""
        return alias(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: the gradient passes as it is."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Hand the gradient to the second argument."""
        return None, grads[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Bring both batches to the front; one that is missing is the same for every sample."""
        value, gradient_of = batched(info, in_dims, *args)
        return carry(REPLACE, value, gradient_of), 0


def _tangent(ctx: Any, *tangents: Any) -> Any:
    return tangents[1]


REPLACE: Family = family(Replace, _tangent)


def batched(info: Any, in_dims: Any, *tensors: Tensor) -> list[Tensor]:
    """Return each tensor with the batch of `vmap` as dim 0."""
    return [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


def replace(value: Tensor, *, gradient_of: Tensor) -> Tensor:
    """Return `value`, bit for bit, with the gradient that `gradient_of` would have had.

    `value` may be any tensor; no gradient goes to what it was computed from. The form that people write by hand,
    `gradient_of + (value - gradient_of).detach()`, rounds: it loses up to all of a `value` that is small beside
    `gradient_of`, turns -0.0 into 0.0 and inf into nan.

    Args:
        value: what comes out; a floating or complex tensor of any shape.
        gradient_of: where the gradient goes, as it comes back; of the same shape, dtype and device.
    Returns:
        A view of `value` (no copy), which torch refuses to change in place. In forward mode its tangent is that of
        `gradient_of`.
    Raises:
        UsageError: an argument is no floating tensor, or shapes, dtypes or devices differ.
    """
    arguments.differentiable("replace", "value", value)
    arguments.differentiable("replace", "gradient_of", gradient_of)
    arguments.same("replace", "value", value, "gradient_of", gradient_of)
    arguments.say_kept_away(value, "none")
    return carry(REPLACE, value, gradient_of)
