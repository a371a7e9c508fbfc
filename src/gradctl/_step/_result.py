"""What one step did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What one step did. Numbers that lie on a device are read when they are asked for, and not before.

    Args:
        skipped: nothing was updated: a gradient was NaN or inf, or there was no item at all.
        scale: the loss scale of this step; 1.0 without one.
        items: what the step was divided by: rows, tokens, or what else was counted; 0 if nothing was.
        microbatches: how many were accumulated.
        losses: the loss of each microbatch, detached, [] each, with its share in the loss of the step.
        norm: the gradient norm before clipping, or None if nobody asked for it.
        limit: what it was clipped to; inf if it was not to be.
    """

    skipped: bool
    scale: float
    items: float
    microbatches: int
    losses: tuple[tuple[Tensor, float], ...]
    norm: float | Tensor | None
    limit: float

    @cached_property
    def loss(self) -> float:
        """The loss of the step: that of one big batch. NaN if there was no item."""
        if not self.losses:
            return math.nan
        if len(self.losses) == 1:
            value, share = self.losses[0]
            return float(value) * share
        values = torch.stack([value.double() for value, _ in self.losses]).tolist()
        return math.fsum(value * share for value, (_, share) in zip(values, self.losses, strict=True))

    @cached_property
    def grad_norm(self) -> float | None:
        """The norm of all gradients taken as one vector, unscaled and before clipping; None if it was not measured."""
        return None if self.norm is None else float(self.norm)

    @property
    def clipped(self) -> bool:
        """Whether the gradients were above the limit of `clip`, by norm."""
        return self.grad_norm is not None and self.grad_norm > self.limit

    def __repr__(self) -> str:
        norm = "" if self.norm is None else f", grad_norm={self.grad_norm:.4g}"
        told = ", skipped" if self.skipped else ""
        return f"StepResult(loss={self.loss:.4g}{norm}, items={self.items:g}, scale={self.scale:g}{told})"
