"""Pairs of pictures: bars of some direction, and a marker in one half."""

from __future__ import annotations

import math

import torch

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Pictures:
    def __init__(self, size: int, seed: int):
        self.size, self.rng = size, torch.Generator().manual_seed(seed)
        axis = torch.linspace(-1, 1, size)
        self.rows, self.cols = torch.meshgrid(axis, axis, indexing="ij")

    def _noise(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.rng)

    def bars(self, kind: torch.Tensor, kinds: int) -> torch.Tensor:
        angle = kind.float() * math.pi / kinds + 0.05 * self._noise(len(kind))
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        phase = 3.0 * self._noise(len(kind), 1, 1)
        wave = torch.sin(6.0 * (cos * self.cols + sin * self.rows) + phase)
        return (wave + 0.1 * self._noise(*wave.shape)).unsqueeze(1)

    def source(self, count: int, kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
        kind = torch.randint(0, kinds, (count,), generator=self.rng)
        return self.bars(kind, kinds), kind

    def target(self, count: int) -> Batch:
        """Two directions times two places of the marker."""
        kind = torch.randint(0, 4, (count,), generator=self.rng)
        place = torch.where(kind // 2 == 0, -0.6, 0.6)[:, None, None]
        marker = torch.exp(-4.0 * (self.rows - place) ** 2).expand(count, self.size, self.size)
        return self.bars(kind % 2, 2), marker.unsqueeze(1) * 2.0 - 1.0, kind


def rotated(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All four rotations of the first quarter of a batch, with their numbers."""
    part = x[: max(1, len(x) // 4)]
    turned = torch.cat([part.rot90(k, dims=(2, 3)) for k in range(4)])
    return turned, torch.arange(4).repeat_interleave(len(part))
