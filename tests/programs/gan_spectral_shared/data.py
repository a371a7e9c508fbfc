"""Blobs in one of four corners, one corner per class."""

from __future__ import annotations

import torch


class Blobs:
    def __init__(self, size: int, classes: int, seed: int):
        self.size, self.classes = size, classes
        self.generator = torch.Generator().manual_seed(seed)
        axis = torch.linspace(-1, 1, size)
        self.grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(0, self.classes, (count,), generator=self.generator)
        centre = torch.stack([(y % 2).float() - 0.5, (y // 2).float() - 0.5], dim=1)
        centre = centre + 0.1 * torch.randn(count, 2, generator=self.generator)
        distance = (self.grid[None] - centre[:, :, None, None]).square().sum(dim=1, keepdim=True)
        return 2.0 * torch.exp(-6.0 * distance) - 1.0, y


def augment(x: torch.Tensor) -> torch.Tensor:
    """The same differentiable augmentation for real and generated images."""
    brightness = 0.1 * torch.randn(x.shape[0], 1, 1, 1)
    keep = (torch.rand(x.shape[0], 1, x.shape[2], 1) > 0.05).to(x.dtype)
    return (x + brightness) * keep
