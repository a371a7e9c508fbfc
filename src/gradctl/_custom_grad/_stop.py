"""`stop`: no gradient passes."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from gradctl._custom_grad import _arguments as arguments
from gradctl._custom_grad._arguments import pytree
from gradctl._errors import UsageError

T = TypeVar("T")


def stop(x: T) -> T:
    """Return `x` as a constant: the same values, no gradient in any mode.

    The result shares memory with `x`, as with `detach`: who changes it in place changes `x`, and a backward that saved
    `x` then refuses. Tangents of forward mode stop too, and so does every level of `torch.func`.

    Args:
        x: a tensor of any dtype, or a nested tuple, list or dict that holds one; what is no tensor passes as it is.
    Returns:
        The same structure; no tensor in it requires a gradient.
    Raises:
        UsageError: there is no tensor in `x`.
    Source: `jax.lax.stop_gradient`. Differs: refuses an `x` without any tensor.
    """
    if isinstance(x, Tensor):
        return _stopped(x)  # pyright: ignore[reportReturnType]
    leaves, spec = pytree.tree_flatten(x)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise UsageError(
            f"stop: x is of type {type(x).__name__} and holds no tensor",
            why="nothing in it could have a gradient",
            fix="leave the call out, or pass the tensor",
        )
    return pytree.tree_unflatten([_stopped(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _stopped(x: Tensor) -> Tensor:
    arguments.say_kept_away(x, "none")
    return x.detach()
