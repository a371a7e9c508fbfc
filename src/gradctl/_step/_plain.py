"""The precision of a program that asked for none: nothing is cast, scaled or copied."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradctl import _taps


class AsItIs:
    """Stands where an attached precision stands, and changes nothing.

    Args:
        optimizers: all that are stepped.
    """

    scales = False
    loss_scale = 1.0

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self._optimizers = optimizers

    def forward(self) -> AbstractContextManager[Any]:
        """Compute as the program does."""
        return _NOTHING

    def is_inside_forward(self) -> bool:
        """Nothing depends on where the backward runs."""
        return False

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss."""
        return loss

    def collect(self) -> None:
        """Nothing is kept elsewhere."""

    def stepped(self) -> list[Tensor]:
        """Return the parameters of all optimizers."""
        return [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]

    def step(self, optimizer: Any) -> Any:
        """Let the optimizer step."""
        return optimizer.step()

    def skip(self, optimizer: Any) -> None:
        """Nobody listens."""

    def update(self, found_inf: bool) -> None:
        """There is no loss scale."""

    def zero_grad(self) -> None:
        """Drop the gradients of all optimizers."""
        for optimizer in self._optimizers:
            if type(optimizer).zero_grad is not _ZERO_GRAD or _taps.zero_grad.is_installed():
                optimizer.zero_grad(set_to_none=True)
                continue
            for group in optimizer.param_groups:  # what torch's own does, less the profiling around it
                for parameter in group["params"]:
                    parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing over."""

    def remove(self) -> None:
        """There is nothing to take back."""


_ZERO_GRAD = Optimizer.zero_grad
_NOTHING: AbstractContextManager[Any] = contextlib.nullcontext()
