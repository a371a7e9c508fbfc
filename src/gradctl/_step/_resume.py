"""What a run that is resumed needs, also in the middle of an accumulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradctl._errors import UsageError
from gradctl._step._order import Order, SoFar
from gradctl._step._settings import Settings


def state_of(order: Order, settings: Settings) -> dict[str, Any]:
    """Return counts, loss scale and the gradients so far, as copies."""
    so_far = order.so_far
    state: dict[str, Any] = {
        "accumulate": settings.accumulate,
        "steps": order.steps,
        "skips_in_a_row": order.skips_in_a_row,
        "precision": order.attached.state_dict(),
        "microbatches": so_far.microbatches,
    }
    if so_far.microbatches:
        state |= {
            "items": so_far.items,
            "divisor": so_far.divisor,
            "items_by_divisor": so_far.items_by_divisor,
            "losses": [(value.clone(), weight) for value, weight in so_far.losses],
            "gradients": {
                name: parameter.grad.detach().clone()
                for name, parameter in order.named().items()
                if parameter.grad is not None
            },
        }
    return state


def load_state(order: Order, settings: Settings, state: dict[str, Any]) -> None:
    """Take over what `state_of` returned.

    Raises:
        UsageError: it does not fit.
    """
    if state["microbatches"] and state["accumulate"] != settings.accumulate:
        raise UsageError(
            f"a state with accumulate={state['accumulate']} for a Step with accumulate={settings.accumulate}",
            what=f"{state['microbatches']} microbatches of a step are in it",
            fix="save after a step, or keep accumulate",
        )
    named = order.named()
    gradients: dict[str, Tensor] = state.get("gradients", {})
    for name, gradient in gradients.items():
        if name not in named or named[name].shape != gradient.shape:
            raise UsageError(
                f"the state has a gradient of {name}, shape {list(gradient.shape)}",
                what="no optimizer steps such a parameter" if name not in named else "the parameter has another shape",
                fix="load it into a Step over the same model and optimizers",
            )
    order.attached.load_state_dict(state["precision"])
    order.steps = int(state["steps"])
    order.skips_in_a_row = int(state["skips_in_a_row"])
    order.attached.zero_grad()
    for name, gradient in gradients.items():
        parameter = named[name]
        parameter.grad = _beside(gradient, parameter)
    order.so_far = SoFar()
    if state["microbatches"]:
        order.so_far = SoFar(
            microbatches=int(state["microbatches"]),
            items=float(state["items"]),
            divisor=float(state["divisor"]),
            losses=[(value.clone(), float(weight)) for value, weight in state["losses"]],
            items_by_divisor=state["items_by_divisor"],
        )


def _beside(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Copy a gradient to the device of its parameter, laid out as autograd would have left it."""
    if gradient.layout is not torch.strided:
        return gradient.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
