"""Jacobian-vector products by backward alone: the transposed product, differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Values = Sequence[Tensor]


def zeros_for(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients with zeros where there is none."""
    return [
        torch.zeros_like(tensor) if value is None else value.detach() for value, tensor in zip(found, like, strict=True)
    ]


class TwiceBackward:
    """Products with the Jacobian of a part of a graph, by backward through the transposed product.

    The transposed product J'u is linear in u; its graph is recorded once, for any u, and its own transposed is J.
    """

    def __init__(
        self, outputs: Sequence[Tensor | GradientEdge], like: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> None:
        self._outputs = outputs
        self._inputs = inputs
        self._us = [torch.zeros_like(value, requires_grad=True) for value in like]
        with torch.enable_grad():
            found = torch.autograd.grad(cast("Any", outputs), inputs, self._us, create_graph=True, allow_unused=True)
        each = cast("Sequence[Tensor | None]", found)
        self._live = [number for number, value in enumerate(each) if value is not None and value.requires_grad]
        self._transposed = [found[number] for number in self._live]

    def forth(self, v: Values) -> list[Tensor]:
        """Return J v, one tensor an output."""
        found = torch.autograd.grad(
            self._transposed, self._us, [v[number] for number in self._live], retain_graph=True, allow_unused=True
        )
        return zeros_for(found, self._us)

    def along(self, number: int, v: Tensor, *, batched: bool) -> Tensor | None:
        """Return the derivative of the first output along one input, or a batch of them; None where it is zero."""
        if number not in self._live:
            return None
        return torch.autograd.grad(
            self._transposed[self._live.index(number)],
            self._us[:1],
            v,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )[0]

    def back(self, u: Values) -> Sequence[Tensor | None]:
        """Return J' u, one tensor an input, None where nothing arrives."""
        return torch.autograd.grad(cast("Any", self._outputs), self._inputs, u, retain_graph=True, allow_unused=True)
