"""`clip`: forward is the identity, backward clips the gradient that passes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from gradctl._custom_grad import _arguments as arguments
from gradctl._custom_grad._vehicle import Family, alias, carry, family, no_forward_mode
from gradctl._errors import UsageError


class ClipNorm(Function):
    """`x`, whose gradient has at most a given norm, one for each index of the `kept` leading dims."""

    @staticmethod
    def forward(x: Tensor, most: float, kept: int) -> Tensor:
        """Return `x` itself, as a view."""
        return alias(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the bound and how many dims have norms of their own."""
        _, ctx.most, ctx.kept = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient, shortened where it is too long and bit for bit the same where it is not."""
        return _shortened(grads[0], ctx.most, ctx.kept), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Give each sample of the batch its own norm, as a loop over the samples would."""
        x, most, kept = args
        return carry(CLIP_NORM, x.movedim(in_dims[0], 0), most, kept + 1), 0


class ClipValue(Function):
    """`x`, each element of whose gradient has at most a given magnitude."""

    @staticmethod
    def forward(x: Tensor, most: float) -> Tensor:
        """Return `x` itself, as a view."""
        return alias(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the bound."""
        ctx.most = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient with each element brought to within the bound."""
        g = _dense(grads[0], "value")
        if g.is_complex():
            return _shortened(g, ctx.most, g.dim()), None  # the direction in the complex plane is kept
        most = ctx.most if ctx.most < 6e4 else min(ctx.most, torch.finfo(g.dtype).max)  # float16 ends at 65504
        return g.clamp(-most, most), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Treat a batch as one tensor: each element is clipped by itself."""
        return carry(CLIP_VALUE, *args), in_dims[0]


_NO_TANGENT = no_forward_mode("clip", "it acts on the gradient that comes back, and a tangent is not one")
CLIP_NORM: Family = family(ClipNorm, _NO_TANGENT)
CLIP_VALUE: Family = family(ClipValue, _NO_TANGENT)


def clip(
    x: Tensor,
    *,
    norm: float | None = None,
    value: float | None = None,
    per: Literal["tensor", "sample"] = "tensor",
) -> Tensor:
    """Return `x`, bit for bit; the gradient that comes back is clipped by norm or by value.

    By norm: multiplied by `norm / max(norm, ‖g‖)` with the Euclidean norm taken in float32 or wider, so a gradient that
    is short enough passes bit for bit. By value: each element is brought to within ±`value` (a complex one keeps its
    direction). Clipping by norm does not hide what is broken: a norm that is not finite (inf, nan, or above 1.8e19 in
    float32) gives nan everywhere. By value nan stays nan, and inf becomes `value`.

    Under `vmap` each sample has its own norm, as in a loop over the samples; `per="sample"` says the same of dim 0
    without `vmap`. The second derivative is that of the clipping. There is no forward mode.

    Args:
        x: a floating or complex tensor of any shape.
        norm: the longest gradient that passes, above 0. Give this or `value`.
        value: the largest element that passes, above 0.
        per: which elements share a norm: all of them, or those of one index of dim 0.
    Returns:
        A view of `x` (no copy), which torch refuses to change in place.
    Raises:
        UsageError: neither or both bounds are given, one is 0, negative or not finite, `per` does not fit, `x` is no
            floating tensor; in backward, when the gradient is sparse; in forward mode.
    """
    if (norm is None) == (value is None):
        raise UsageError(
            "clip: give norm or value" if norm is None else "clip: norm and value are both given",
            why="they clip differently, and one order of the two is not the other",
            fix="one of them; for both: gradctl.clip(gradctl.clip(x, norm=…), value=…) clips by value first",
        )
    arguments.differentiable("clip", "x", x)
    if norm is None:
        if per != "tensor":
            raise UsageError(
                f"clip: per={per!r} with value", why="each element is clipped by itself", fix="leave per out"
            )
        return carry(CLIP_VALUE, x, _bound("value", value))
    if per == "tensor":
        return carry(CLIP_NORM, x, _bound("norm", norm), 0)
    if per != "sample":
        raise UsageError(f"clip: per={per!r}", fix='per="tensor" or per="sample"')
    if x.dim() == 0:
        raise UsageError(
            "clip: x has no dim, so it has no samples", why="samples are the indices of dim 0", fix="leave per out"
        )
    return carry(CLIP_NORM, x, _bound("norm", norm), 1)


def _bound(name: str, given: Any) -> float:
    most = arguments.real("clip", name, given)
    if most <= 0:
        raise UsageError(
            f"clip: {name}={most} is not above 0",
            why="0 lets nothing through, and a negative bound turns the gradient around",
            fix="a bound above 0; gradctl.stop(x) lets nothing through, gradctl.reverse(x) turns it around",
        )
    return most


def _shortened(g: Tensor, most: float, kept: int) -> Tensor:
    g = _dense(g, "norm")
    wide = g if g.dtype not in _HALF else g.to(_HALF[g.dtype])
    if kept == g.dim():
        size = wide.abs()
    elif kept == 0:
        size = torch.linalg.vector_norm(wide)
    else:
        size = torch.linalg.vector_norm(wide, dim=tuple(range(kept, g.dim())), keepdim=True)
    # inf - inf and nan - nan are nan, all else is 0: no plausible number comes out of a norm that is none.
    factor = torch.where(size > most, most / size.clamp(min=most), 1.0) + (size - size)  # x / x is not always 1 here
    return (wide * factor).to(g.dtype)


_HALF = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


def _dense(g: Tensor, by: str) -> Tensor:
    if torch.compiler.is_compiling():
        return g  # Dynamo does not let a backward ask for the layout; a compiled sparse gradient fails in the norm
    if g.layout is not torch.strided and not g.is_nested:
        raise UsageError(
            f"clip({by}=…): the gradient is sparse ({g.layout})",
            why="one row may be stored in several parts, whose sizes say nothing about the row",
            fix="sparse=False in the embedding, or clip its output instead of its weight",
        )
    return g
