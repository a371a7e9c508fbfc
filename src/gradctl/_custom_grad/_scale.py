"""`scale` and `reverse`: forward is the identity, backward multiplies the gradient."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor
from torch.autograd import Function

from gradctl._custom_grad import _arguments as arguments
from gradctl._custom_grad._vehicle import Family, alias, carry, family
from gradctl._errors import UsageError

T = TypeVar("T")


class Scale(Function):
    """`x`, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(x: Tensor, s: float) -> Tensor:
        """Return `x` itself, as a view."""
        return alias(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the number."""
        ctx.s = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient times the number."""
        return grads[0] * ctx.s, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Treat a batch as one tensor: a number scales all samples alike."""
        return carry(SCALE, *args), in_dims[0]


class ScaleBy(Function):
    """`x`, whose gradient is multiplied by a tensor."""

    @staticmethod
    def forward(x: Tensor, s: Tensor) -> Tensor:
        """Return `x` itself, as a view."""
        return alias(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the tensor where autograd sees it: changed in place before backward, it raises there."""
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient times the tensor, in the gradient's own dtype."""
        (s,) = ctx.saved_tensors
        return (grads[0] * s).to(grads[0].dtype), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Bring both batches to the front, so that a sample's `s` meets that sample."""
        (x, s), (x_dim, s_dim) = args, in_dims
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        if s_dim is not None:
            s = s.movedim(s_dim, 0)
            s = s.reshape(s.shape[0], *(1,) * (x.dim() - s.dim()), *s.shape[1:])
        return carry(SCALE_BY, x, s), 0


def _scale_tangent(ctx: Any, *tangents: Any) -> Any:
    return tangents[0] * ctx.s


def _scale_tangent_by(ctx: Any, *tangents: Any) -> Any:
    (s,) = ctx.saved_tensors
    return (tangents[0] * s).to(tangents[0].dtype)


SCALE: Family = family(Scale, _scale_tangent)
SCALE_BY: Family = family(ScaleBy, _scale_tangent_by)


def scale(x: T, s: float | Tensor) -> T:
    """Return `x`, bit for bit; the gradient that comes back is multiplied by `s`.

    The Jacobian is `s` times the identity in every mode: backward, double backward, `vmap`, `jvp`.
    The result is a view of `x` (no copy), and torch refuses to change it in place.

    Args:
        x: a floating or complex tensor of any shape, or a nested tuple, list or dict of such; None in it passes.
        s: a finite real number, or a real tensor without a gradient that broadcasts to the shape of each tensor.
            0 gives gradients of zeros, where `stop` gives none.
    Returns:
        The same structure, shapes, dtypes and devices.
    Raises:
        UsageError: `x` holds integers or no tensor, or `s` is not finite, not real, too large in shape, or requires a
            gradient.
    """
    if isinstance(x, Tensor):
        return _scaled("scale", x, s)  # pyright: ignore[reportReturnType]
    return arguments.each("scale", "x", x, lambda leaf: _scaled("scale", leaf, s))


def reverse(x: T, strength: float | Tensor = 1.0) -> T:
    """Return `x`, bit for bit; the gradient that comes back is multiplied by `-strength`.

    Everything else is as in `scale`.

    Args:
        x: a floating or complex tensor of any shape, or a nested tuple, list or dict of such; None in it passes.
        strength: a finite number, 0 or above, or a real tensor as in `scale` (whose sign is not looked at).
    Returns:
        The same structure, shapes, dtypes and devices.
    Raises:
        UsageError: `x` holds integers or no tensor, or `strength` is negative, not finite or requires a gradient.
    Source: Ganin and Lempitsky 2015, arXiv:1409.7495, section 3 (the gradient reversal layer).
    """
    if isinstance(strength, Tensor):
        s: float | Tensor = -_factor("reverse", "strength", strength)
    else:
        value = arguments.real("reverse", "strength", strength)
        if value < 0:
            raise UsageError(
                f"reverse: strength={value} is negative",
                why="the two signs would cancel, and nothing would be reversed",
                fix=f"gradctl.scale(x, {-value}) for a gradient that keeps its sign",
            )
        s = -value
    if isinstance(x, Tensor):
        return _scaled("reverse", x, s)  # pyright: ignore[reportReturnType]
    return arguments.each("reverse", "x", x, lambda leaf: _scaled("reverse", leaf, s))


def _scaled(call: str, x: Tensor, s: Any) -> Tensor:
    arguments.differentiable(call, "x", x)
    if isinstance(s, Tensor):
        _factor(call, "s", s)
        _broadcasts(call, x, s)
        return carry(SCALE_BY, x, s)
    factor = arguments.real(call, "s", s)
    if factor == 0.0:
        arguments.say_kept_away(x, "zero")
    return carry(SCALE, x, factor)


def _factor(call: str, name: str, s: Tensor) -> Tensor:
    if s.requires_grad:
        raise UsageError(
            f"{call}: {name} requires a gradient, and would get none",
            why="it multiplies the gradient, not the value, so the loss does not depend on it",
            fix=f"pass {name}.detach()",
        )
    if s.is_complex():
        raise UsageError(
            f"{call}: {name} is complex", why="a gradient is scaled by a real factor", fix="pass a real tensor"
        )
    return s


def _broadcasts(call: str, x: Tensor, s: Tensor) -> None:
    fits = s.dim() <= x.dim() and all(
        mine in (1, theirs) for mine, theirs in zip(reversed(s.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise UsageError(
            f"{call}: a factor of shape {list(s.shape)} does not broadcast to x of shape {list(x.shape)}",
            why="the gradient has the shape of x, and has to keep it",
            fix="a factor of the shape of x, or with ones in its place",
        )
    if s.dim() and s.device != x.device:
        raise UsageError(f"{call}: the factor is on {s.device}, x on {x.device}", fix="move it: s.to(x.device)")
