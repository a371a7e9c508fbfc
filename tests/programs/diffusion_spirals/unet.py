"""A U-Net with two resolutions, time conditioning and zero-initialised output."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t, dim):
    half = dim // 2
    rate = torch.exp(-math.log(1000.0) * torch.arange(half, dtype=torch.float32) / half)
    angle = t.float()[:, None] * rate[None]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, cin, cout, emb, dropout=0.05):
        super().__init__()
        self.norm1 = nn.GroupNorm(2, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.film = nn.Linear(emb, 2 * cout)
        self.norm2 = nn.GroupNorm(2, cout)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.drop(F.silu(h)))
        return h + self.skip(x)


class SpatialAttention(nn.Module):
    def __init__(self, ch, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(2, ch)
        self.qkv = nn.Conv2d(ch, 3 * ch, 1)
        self.proj = nn.Conv2d(ch, ch, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        out = F.scaled_dot_product_attention(*(z.transpose(-1, -2) for z in (q, k, v)))
        return x + self.proj(out.transpose(-1, -2).reshape(b, c, h, w))


class UNet(nn.Module):
    def __init__(self, channels=2, width=12, use_checkpoint=True):
        super().__init__()
        emb = 4 * width
        self.width, self.use_checkpoint = width, use_checkpoint
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down1 = ResBlock(width, width, emb)
        self.down2 = ResBlock(width, 2 * width, emb)
        self.mid = ResBlock(2 * width, 2 * width, emb)
        self.attn = SpatialAttention(2 * width)
        self.up2 = ResBlock(4 * width, width, emb)
        self.up1 = ResBlock(2 * width, width, emb)
        self.norm = nn.GroupNorm(2, width)
        self.out = nn.Conv2d(width, channels, 3, padding=1)
        self.out.weight.data.mul_(0.1)
        self.out.bias.data.zero_()

    def _run(self, block, x, emb):
        if self.use_checkpoint and self.training:
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def forward(self, x, t):
        emb = self.time(timestep_embedding(t, self.width))
        h0 = self.stem(x)
        h1 = self._run(self.down1, h0, emb)
        h2 = self._run(self.down2, F.avg_pool2d(h1, 2), emb)
        mid = self.attn(self._run(self.mid, F.avg_pool2d(h2, 2), emb))
        up = F.interpolate(mid, scale_factor=2, mode="nearest")
        up = self._run(self.up2, torch.cat([up, h2], dim=1), emb)
        up = F.interpolate(up, scale_factor=2, mode="nearest")
        up = self._run(self.up1, torch.cat([up, h1], dim=1), emb)
        return self.out(F.silu(self.norm(up)))
