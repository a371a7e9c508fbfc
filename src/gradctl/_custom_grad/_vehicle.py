"""Which form of `autograd.Function` carries a gradient of our own: no single form works everywhere.

| where | form | why not another |
|---|---|---|
| eager | `forward(ctx, …)` with a `jvp` | a third of the time: torch binds the arguments of the other by signature |
| torch.func | `setup_context`, `vmap` and `jvp` | torch.func refuses the other form |
| torch.compile | `setup_context` and `vmap` | Dynamo refuses a custom `jvp` |

One class is written, in the last form; `family` derives the other two, so that forward and backward stand once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from gradctl import _torch_private as private
from gradctl._errors import UsageError

transforms_active: Callable[[], bool] = private.get("transforms_active")
_KNOWS_FORWARD_LEVEL = private.find("forward_level") is not None


@dataclass(frozen=True, slots=True)
class Family:
    """Three classes with one forward and one backward; `carry` picks."""

    eager: type[Function]
    transformed: type[Function]
    compiled: type[Function]


def family(written: type[Any], jvp: Callable[..., Any]) -> Family:
    """Derive the eager and the torch.func form of a Function that was written with `setup_context` and `vmap`."""

    def forward(ctx: Any, *args: Any) -> Any:
        out = written.forward(*args)
        written.setup_context(ctx, args, out)
        return out

    rules = {
        "backward": staticmethod(written.backward),
        "jvp": staticmethod(jvp),
        "stops": getattr(written, "stops", ()),
        "__module__": written.__module__,
    }
    transformed: Any = type(written.__name__, (written,), {"jvp": staticmethod(jvp), "__module__": written.__module__})
    return Family(
        eager=type(written.__name__, (Function,), {"forward": staticmethod(forward), **rules}),
        transformed=transformed,
        compiled=written,
    )


def carry(kind: Family, value: Tensor, *rest: Any) -> Tensor:
    """Return `value`, bit for bit and without a copy, whose gradient `kind` decides."""
    if torch.compiler.is_compiling():
        return kind.compiled.apply(value, *rest)
    if transforms_active():
        return kind.transformed.apply(value, *rest)
    if not torch.is_grad_enabled() and not in_forward_mode():
        return value.detach()  # a view of a leaf would say that it requires a gradient, of which nothing comes back
    return kind.eager.apply(value, *rest)


def carry_none(kind: Family, *args: Any) -> Any:
    """Apply `kind` where there is no first value to return as it is: under torch.func and torch.compile."""
    return (kind.compiled if torch.compiler.is_compiling() else kind.transformed).apply(*args)


def in_forward_mode() -> bool:
    """Whether tangents may be on their way (a dual level is entered)."""
    return _KNOWS_FORWARD_LEVEL and forward_ad._current_level >= 0  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]


def alias(value: Tensor) -> Tensor:
    """Return a view of all of `value`; a copy in forward mode, where torch asks that the tangent be a view as well."""
    if not torch.compiler.is_compiling() and in_forward_mode():
        return value.clone()
    return value.view_as(value)


def no_forward_mode(call: str, why: str) -> Callable[..., Any]:
    """Return the `jvp` of a gradient that has none."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UsageError(
            f"{call}: no forward-mode derivative",
            what="torch.func.jvp, jacfwd, hessian or a dual level reached it",
            why=why,
            fix="differentiate in reverse mode (backward, torch.func.grad, vjp, jacrev)",
        )

    return jvp
