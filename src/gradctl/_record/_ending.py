"""The `end` record: what the run came to, and what could not be seen of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradctl._record._blocks import Drain
from gradctl._record._rows import peak_memory, short
from gradctl._record._state import Costs, OptimizerState

MAX_OPTIMIZERS = 512
"""More optimizers than this are counted, not recorded one by one."""

MAX_ALIKE = 32
"""So many optimizers of one class over the same shapes have a record each; of those that come one after another, the
rest share the last."""


def totals(states: Sequence[OptimizerState], costs: Costs, now: float, *, watched: int | None = None) -> dict[str, Any]:
    """Return steps, costs and tiers of a run that ends at `now`; `watched` steps were asked for, and reached."""
    wall = costs.elapsed(now)
    main = max(states, key=lambda state: state.steps, default=None)
    return {
        "steps": {str(state.o): state.steps for state in states},
        "losses": {
            str(state.o): [short(state.first_loss, 6), short(state.last_loss, 6)]
            for state in states
            if state.first_loss is not None and state.last_loss is not None
        },
        "cost": round(costs.spent, 4),
        "one_off": round(costs.one_off, 4),
        "wall": round(wall, 3),
        "share": round((costs.spent - costs.one_off) / wall, 5) if wall > 0 else 0.0,
        "rss": peak_memory().get("rss"),
        "tiers": {
            "norm_every": main.norm_gap if main is not None else 0,
            "rows": sum(state.rows for state in states),
            **({"watched": watched} if watched is not None else {}),
        },
    }


def not_seen(
    states: Sequence[OptimizerState], drain: Drain, *, functorch: int, waiting: int, uncounted: int
) -> dict[str, str]:
    """Say which training could not be recorded, and why: a run is never empty without a reason.

    Args:
        states: what was recorded.
        drain: knows how many backwards there were.
        functorch: gradients that `torch.func` computed.
        waiting: optimizers that have never stepped.
        uncounted: steps of optimizers beyond `MAX_OPTIMIZERS`.
    """
    found: dict[str, str] = {}
    seen = any(state.steps for state in states)
    if not seen and functorch:
        found["training through torch.func"] = (
            f"torch.func computed gradients {functorch} times; they are returned, never stored in .grad"
        )
    elif not seen and drain.grads:
        found["training through torch.autograd.grad"] = (
            f"it was called {drain.grads} times; its gradients are returned, never stored in .grad"
        )
    if seen and not drain.backwards:
        found["the backward"] = (
            "an optimizer stepped, but no backward was called from Python: a compiled step, C++, "
            "or gradients that the program writes itself"
        )
    if not seen and waiting:
        found["the optimizer's steps"] = f"{waiting} optimizers were made and none has stepped"
    if uncounted:
        found["some optimizers"] = f"there were more than {MAX_OPTIMIZERS}; {uncounted} steps are not recorded"
    return found
