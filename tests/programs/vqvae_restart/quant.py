"""Quantisers with straight-through gradients: of codes, and of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class RoundThrough(torch.autograd.Function):
    """Rounds to integers within limits; the gradient passes inside the limits."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, low: int, high: int) -> torch.Tensor:
        rounded = x.round()
        ctx.save_for_backward((rounded >= low) & (rounded <= high))
        return rounded.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


class FakeQuantMixin:
    """Weights on a symmetric grid of `bits` bits per output channel, once switched on."""

    bits: int = 8
    active: bool = False
    channel_dim: int = 0

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def scale(self) -> torch.Tensor:
        dims = [d for d in range(self.weight.ndim) if d != self.channel_dim]
        return self.weight.detach().abs().amax(dim=dims, keepdim=True).clamp(min=1e-8) / self.top

    def grid_weight(self) -> torch.Tensor:
        if not self.active:
            return self.weight
        scale = self.scale
        return RoundThrough.apply(self.weight / scale, -self.top - 1, self.top) * scale

    @torch.no_grad()
    def integers(self) -> torch.Tensor:
        return (self.weight / self.scale).round().to(torch.int8)


class QuantConv(FakeQuantMixin, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.grid_weight(), self.bias)


class QuantConvT(FakeQuantMixin, nn.ConvTranspose2d):
    channel_dim = 1

    def forward(self, x: torch.Tensor, output_size=None) -> torch.Tensor:
        return F.conv_transpose2d(x, self.grid_weight(), self.bias, self.stride, self.padding)


class Codebook(nn.Module):
    """Replaces every vector by its nearest code."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.table = nn.Embedding(codes, dim)
        self.table.weight.data.uniform_(-1.0, 1.0)
        self.register_buffer("hits", torch.zeros(codes, dtype=torch.long))
        self.recent: torch.Tensor | None = None

    def nearest(self, flat: torch.Tensor) -> torch.Tensor:
        return torch.cdist(flat, self.table.weight).argmin(dim=1)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        with torch.no_grad():
            index = self.nearest(flat)
        chosen = self.table(index)
        codebook_loss = F.mse_loss(chosen, flat.detach())
        commitment = F.mse_loss(flat, chosen.detach())
        through = flat + (chosen - flat).detach()
        if self.training:
            self.hits += torch.bincount(index, minlength=len(self.hits))
            self.recent = flat.detach()
        shape = (z.shape[0], *z.shape[2:], z.shape[1])
        return through.view(shape).permute(0, 3, 1, 2), codebook_loss, commitment, index

    @torch.no_grad()
    def restart(self, below: int) -> torch.Tensor:
        """Put codes that are hardly used onto encodings of the last batch; returns which ones."""
        dead = (self.hits < below).nonzero().squeeze(1)
        if len(dead) and self.recent is not None:
            picks = torch.randint(0, self.recent.shape[0], (len(dead),))
            self.table.weight.data[dead] = self.recent[picks] + 0.01 * torch.randn(len(dead), 1)
        self.hits.zero_()
        return dead
