"""What each sample's outputs add to the gradient of a loss of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradctl._derivatives._batch import output_tensors
from gradctl._errors import UsageError


@dataclass(frozen=True, slots=True)
class Shares:
    """The gradient of the loss of a batch with respect to its outputs.

    Args:
        places: which of the tensors in the outputs have a row for each sample.
        values: the gradient of each of those, [B, ...].
    """

    places: list[int]
    values: list[Tensor]

    def weigh(self, outputs: Any, values: list[Tensor]) -> Tensor:
        """The sum of the outputs weighted by these rows, shape []: its gradient is the share of the rows."""
        tensors = output_tensors(outputs)
        total = [(tensors[place] * value).sum() for place, value in zip(self.places, values, strict=True)]
        return torch.stack(total).sum()


def shares_of(outputs: Any, loss: Tensor, size: int, *, retain_graph: bool = False) -> Shares:
    """Split the gradient of a loss by the rows of the outputs that it was computed from.

    Raises:
        UsageError: the outputs have no row for each sample.
    """
    tensors = output_tensors(outputs)
    places = [place for place, one in enumerate(tensors) if one.dim() and one.shape[0] == size and one.requires_grad]
    found: list[Tensor | None] = []
    if places and loss.requires_grad:
        rows = [tensors[place] for place in places]
        found = list(torch.autograd.grad(loss, rows, allow_unused=True, retain_graph=retain_graph))
    used = {place: value for place, value in zip(places, found, strict=False) if value is not None}
    if not used:
        raise UsageError(
            "the loss does not come from outputs with a row for each sample",
            what=f"no tensor that the model returns has shape [{size}, ...] and leads to the loss",
            fix="let the model return [B, ...] and compute the loss from it in loss_fn",
        )
    return Shares(list(used), list(used.values()))
