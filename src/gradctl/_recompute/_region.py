"""Run a function as one region of a tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradctl import _torch_private as private
from gradctl._recompute._notes import Keep, RegionPlan
from gradctl._recompute._storage import Verify
from gradctl._recompute._tape import Recording, Tape, outer_hooks

_no_dispatch = private.get("no_torch_dispatch")
_leaf = torch.zeros(1, requires_grad=True)
_alias = torch.ops.aten.alias.default


def records_graphs() -> bool:
    """Whether operations record a graph here: not under `no_grad`, nor where the process has switched them off.

    `torch.is_grad_enabled()` tells the mode of the thread only; what an operation does tells the truth.
    """
    with _no_dispatch(), torch._C.DisableTorchFunction():
        return bool(_alias(_leaf).requires_grad)


def run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    plan: RegionPlan | None = None,
    keep: Keep | None = None,
    verify: Verify = "full",
) -> tuple[Any, Tape]:
    """Call a function; what autograd saves of it is kept or dropped as the plan or the policy says.

    Returns:
        What the function returned, and the tape of the call.
    """
    tape = Tape(plan=plan, keep=keep, verify=verify, outer=outer_hooks())
    with torch.autograd.graph.saved_tensors_hooks(tape.pack, tape.unpack), Recording(tape):
        out = function(*args, **kwargs)
    tape.finish()
    return out, tape
