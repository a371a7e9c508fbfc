"""Vectors around cluster centres, seen through two random views."""

from __future__ import annotations

from collections.abc import Iterator

import torch

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Views:
    def __init__(self, dim: int, clusters: int, seed: int):
        self.rng = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(clusters, dim, generator=self.rng)
        self.dim, self.clusters = dim, clusters

    def clean(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.randint(0, self.clusters, (count,), generator=self.rng)
        noise = 0.6 * torch.randn(count, self.dim, generator=self.rng)
        return self.centres[label] + noise, label

    def view(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.rand(x.shape, generator=self.rng) > 0.2
        scale = 1.0 + 0.2 * torch.randn(x.shape[0], 1, generator=self.rng)
        out = x * scale
        out[~keep] = 0.0
        return out

    def batches(self, count: int, size: int) -> Iterator[Batch]:
        for _ in range(count):
            x, label = self.clean(size)
            yield self.view(x), self.view(x), label
