"""Weights in 16 bits, widened to float32 while their optimizer steps.

The parameters are bfloat16, and the program's own objects. For the time of one `optimizer.step()` their data are
float32; the optimizer makes and keeps its state in float32, and what it leaves is rounded on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl._precision._masters import copy_all, give_dtype, widen
from gradctl._precision._rounding import join, round_stochastically, split

Rounding = Literal["stochastic", "compensated"]


class Sixteen:
    """The 16-bit weights that one optimizer steps.

    Args:
        named: the parameters by name, float32 or bfloat16; bfloat16 from now on.
        rounding: how what the optimizer leaves becomes bfloat16.
        generators: one for each device, shared by all optimizers; used by stochastic rounding.
    """

    def __init__(
        self, named: Mapping[str, Parameter], rounding: Rounding, generators: dict[torch.device, torch.Generator]
    ) -> None:
        by_device: dict[torch.device, dict[str, Parameter]] = {}
        for name, parameter in named.items():
            by_device.setdefault(parameter.device, {})[name] = parameter
        self.is_wide = False
        self._were = {name: parameter.dtype for name, parameter in named.items()}
        self._parts = [_Part(part, rounding, generators.get(device)) for device, part in by_device.items()]

    def widen(self) -> None:
        """Make the weights float32, for the optimizer."""
        if not self.is_wide:
            self.is_wide = True
            for part in self._parts:
                part.widen()

    def narrow(self) -> None:
        """Round the weights back to bfloat16."""
        if self.is_wide:
            self.is_wide = False
            for part in self._parts:
                part.narrow()

    def remainders(self) -> dict[str, Tensor]:
        """Return what rounding took off each weight, int16 in its shape, by name; empty if that is not kept."""
        return {name: tensor for part in self._parts for name, tensor in part.remainders().items()}

    def remove(self) -> None:
        """Give the weights the dtypes that they had; float32 ones with all their bits, if those were kept."""
        self.widen()
        self.is_wide = False
        with torch.no_grad():
            for part in self._parts:
                for name, parameter in part.named.items():
                    parameter.data = parameter.data.clone()  # of its own, and not a view of all
                    give_dtype(parameter, self._were[name])
        self._parts = []


class _Part:
    """Weights on one device: in 16 bits each for itself, wide in one flat tensor that lives for one step only."""

    def __init__(self, named: Mapping[str, Parameter], rounding: Rounding, generator: torch.Generator | None) -> None:
        self.named = dict(named)
        parameters = list(self.named.values())
        with torch.no_grad():
            for parameter in parameters:
                widen(parameter)
        self._layout = [_layout(parameter) for parameter in parameters]
        self._numels = [parameter.numel() for parameter in parameters]
        self._count = sum(self._numels)
        device = parameters[0].device
        self._lower = torch.zeros(self._count, dtype=torch.int16, device=device) if rounding == "compensated" else None
        # The first rounding is to the nearest: no step was taken whose part might get lost.
        self._generator: torch.Generator | None = None
        self._flat: Tensor | None = torch.empty(self._count, dtype=torch.float32, device=device)
        self._wide_data = self._views(self._flat)
        self._narrow_data = [torch.empty_like(parameter, dtype=torch.bfloat16) for parameter in parameters]
        copy_all(self._wide_data, [parameter.data for parameter in parameters])
        self._put(self._wide_data)
        self.narrow()
        self._generator = generator

    def widen(self) -> None:
        # The flat tensor is made anew: between steps its memory belongs to activations.
        self._narrow_data = [parameter.data for parameter in self.named.values()]
        self._flat = flat = torch.empty(self._count, dtype=torch.float32, device=self._narrow_data[0].device)
        self._wide_data = self._views(flat)
        copy_all(self._wide_data, self._narrow_data)
        if self._lower is not None:
            self._lower = self._lower.to(flat.device)
            join(flat, self._lower)
        self._put(self._wide_data)

    def narrow(self) -> None:
        flat = self._flat
        assert flat is not None
        for parameter, view in zip(self.named.values(), self._wide_data, strict=True):
            if parameter.data_ptr() != view.data_ptr():  # an optimizer that writes `p.data = ...`
                view.copy_(parameter.data)
        if self._lower is not None:
            split(flat, lower=self._lower)
        elif self._generator is not None:
            round_stochastically(flat, self._generator)
        copy_all(self._narrow_data, self._wide_data)
        self._put(self._narrow_data)
        self._flat, self._wide_data = None, []

    def remainders(self) -> dict[str, Tensor]:
        return {} if self._lower is None else dict(zip(self.named, self._views(self._lower), strict=True))

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [
            piece.view(size) if stride is None else piece.as_strided(size, stride)
            for piece, (size, stride) in zip(flat.split(self._numels), self._layout, strict=True)
        ]

    def _put(self, data: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self.named.values(), data, strict=True):
            parameter.data = tensor


def _layout(parameter: Tensor) -> tuple[torch.Size, tuple[int, ...] | None]:
    """Return size and strides (None: contiguous) of a weight in the flat tensor; a dense one keeps its own order."""
    strides = torch.empty_like(parameter, device="meta").stride()
    return parameter.size(), None if parameter.is_contiguous() else strides
