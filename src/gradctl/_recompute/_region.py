"""Run a function as one region of a tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradctl._recompute._notes import Keep, RegionPlan
from gradctl._recompute._storage import Verify
from gradctl._recompute._tape import Recording, Tape, outer_hooks


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
