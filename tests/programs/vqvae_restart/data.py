"""Images of bars and checks."""

from __future__ import annotations

import torch


def images(count: int, size: int, kinds: int, rng: torch.Generator) -> torch.Tensor:
    kind = torch.randint(0, kinds, (count, 1, 1), generator=rng)
    phase = torch.randint(0, 4, (count, 1, 1), generator=rng)
    rows, cols = torch.arange(size).view(1, -1, 1), torch.arange(size).view(1, 1, -1)
    bars = ((rows + phase) // 2 % 2).expand(count, size, size)
    stripes = ((cols + phase) // 3 % 2).expand(count, size, size)
    checks = (bars + stripes) % 2
    out = torch.where(kind == 0, bars, torch.where(kind == 1, stripes, checks)).float()
    out += 0.05 * torch.randn(count, size, size, generator=rng)
    return out.unsqueeze(1)
