"""Updating each parameter as soon as its gradient is there, so that no two gradients are in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, optim

from gradctl._errors import UsageError
from gradctl._freeze._rows import Kept, held_of
from gradctl._journal import emit
from gradctl._step._settings import Settings

# What these do to one parameter depends on nothing of another, so that the order of updates does not matter.
_ONE_BY_ONE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
    optim.Rprop,
    optim.ASGD,
)


class InBackward:
    """Hooks that step one parameter each and drop its gradient.

    Args:
        optimizers: of classes that treat each parameter for itself.
    """

    def __init__(self, optimizers: tuple[Any, ...]) -> None:
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_Update(optimizer, group))
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        emit("not_seen", what="gradients", why="each is applied and dropped during the backward (in-backward)")

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class _Update:
    def __init__(self, optimizer: Any, group: dict[str, Any]) -> None:
        self._optimizer = optimizer
        self._group = group
        step = type(optimizer).step
        # Past the wrapper that runs hooks and profiles: listeners to steps hear one step, at the end, and not one for
        # each parameter. Only that one: the wrapper inside of it switches gradients off.
        self._step = step.__wrapped__ if getattr(step, "hooked", False) else step

    def __call__(self, parameter: Tensor) -> None:
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        # Frozen rows are put back by a listener to steps, which hears none here.
        kept = [Kept(parameter, held.rows, optimizer.state.get(parameter) or {}) for held in held_of(parameter)]
        optimizer.param_groups = [{**self._group, "params": [parameter]}]
        try:
            self._step(optimizer)
        finally:
            optimizer.param_groups = groups
        if kept:
            with torch.no_grad():
                for rows in kept:
                    rows.put_back(optimizer.state.get(parameter) or {})
        parameter.grad = None


def refuse_in_backward(settings: Settings, precision: Any, optimizers: tuple[Any, ...]) -> None:
    """Raise where an update in the backward would be another one than after it.

    Raises:
        UsageError: names the setting or the optimizer.
    """
    whole = "needs the gradients of the whole step, and an update in the backward drops each at once"
    mode = None if precision is None else precision.mode
    refused = (
        (f"accumulate={settings.accumulate}", settings.accumulate > 1, "accumulate=1"),
        ("clip", settings.clip_norm is not None or settings.clip_value is not None, "clip=None"),
        (
            f'on_nonfinite="{settings.on_nonfinite}"',
            settings.on_nonfinite != "continue",
            'on_nonfinite="continue"',
        ),
        (f'precision="{mode}"', mode not in (None, "fp32", "bf16-autocast"), 'precision="bf16-autocast"'),
    )
    for name, is_refused, instead in refused:
        if is_refused:
            raise UsageError(
                f'update="in-backward" with {name}',
                what=f"{name} {whole}",
                fix=f'{instead}, or update="after-backward"',
            )
    for optimizer in optimizers:
        if type(optimizer) not in _ONE_BY_ONE:
            raise UsageError(
                f'update="in-backward" with {type(optimizer).__name__}',
                what="only optimizers of torch that treat each parameter for itself are known to be the same then",
                fix='update="after-backward"',
            )


def refuse_foreign(settings: Settings, precision: Any, parameters: list[Any], names: dict[int, str]) -> None:
    """Raise where parameters are updated in the backward by somebody else, and gradients are wanted whole.

    Raises:
        UsageError: names the parameter.
    """
    for parameter in parameters:
        if not getattr(parameter, "_in_backward_optimizers", None):
            continue
        wants = (
            "accumulate" if settings.accumulate > 1
            else "clip" if settings.clip_norm is not None or settings.clip_value is not None
            else "a loss scale" if precision is not None and precision.scaling is not None
            else "a second update"
        )  # fmt: skip
        raise UsageError(
            f"{names.get(id(parameter), 'a parameter')} is updated in the backward already",
            what=f"an optimizer was applied to it with torch's optimizer-in-backward, and Step has {wants}",
            fix='take it off, or let Step do it: Step(..., update="in-backward", on_nonfinite="continue")',
        )
