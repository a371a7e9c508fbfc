"""A transformer whose feed-forward layers are mixtures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from config import ModelConfig
from routing import MixtureOfExperts
from torch import nn
from torch.utils.checkpoint import checkpoint


class LayerScale(nn.Module):
    def __init__(self, width: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        allowed = ~pad[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.proj(out.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """The attention branch starts closed, the mixture branch starts open."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.attention = Attention(cfg.width, cfg.heads)
        self.scale1, self.scale2 = LayerScale(cfg.width, 0.0), LayerScale(cfg.width, 1.0)
        self.mixture = MixtureOfExperts(cfg.width, cfg.hidden, cfg.router)
        self.drop = nn.Dropout(cfg.dropout)
        self.checkpoint = cfg.checkpoint

    def attend(self, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return self.drop(self.scale1(self.attention(self.norm1(x), pad)))

    def forward(self, x: torch.Tensor, pad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.checkpoint and self.training:
            x = x + checkpoint(self.attend, x, pad, use_reentrant=False)
        else:
            x = x + self.attend(x, pad)
        mixed, penalty = self.mixture(self.norm2(x))
        return x + self.drop(self.scale2(mixed)), penalty


class Classifier(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab, cfg.width, padding_idx=0)
        self.register_buffer("place", self.sinusoids(cfg.length, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        self.head = nn.Linear(cfg.width, cfg.classes)

    @staticmethod
    def sinusoids(length: int, width: int) -> torch.Tensor:
        angle = torch.arange(length)[:, None] / 100 ** (torch.arange(0, width, 2) / width)
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pad = tokens == 0
        x, penalties = self.embed(tokens) + self.place, []
        for block in self.blocks:
            x, penalty = block(x, pad)
            penalties.append(penalty)
        keep = (~pad).unsqueeze(-1).to(x.dtype)
        pooled = (self.norm(x) * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1.0)
        return self.head(pooled), torch.stack(penalties).sum()
