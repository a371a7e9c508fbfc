"""Encoder and decoder around the codebook."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from quant import Codebook, FakeQuantMixin, QuantConv, QuantConvT
from settings import Settings
from torch import nn


class ResBlock(nn.Module):
    """Second convolution starts at zero, so that the block starts as identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv1 = QuantConv(width, width, 3, padding=1)
        self.conv2 = QuantConv(width, width, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(self.norm(x)))))


class VQVAE(nn.Module):
    def __init__(self, cfg: Settings):
        super().__init__()
        w = cfg.width
        self.commitment = cfg.commitment
        self.encoder = nn.Sequential(
            nn.Conv2d(1, w, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(w, w, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(w, cfg.code_dim, 1),
        )
        self.codebook = Codebook(cfg.codes, cfg.code_dim)
        self.decoder = nn.Sequential(
            QuantConv(cfg.code_dim, w, 3, padding=1),
            ResBlock(w),
            nn.ReLU(),
            QuantConvT(w, w, 4, stride=2, padding=1),
            nn.ReLU(),
            QuantConv(w, 1, 3, padding=1),
        )
        for module in self.quantized():
            module.bits = cfg.bits

    def quantized(self) -> list[FakeQuantMixin]:
        return [m for m in self.modules() if isinstance(m, FakeQuantMixin)]

    def set_quantization(self, active: bool) -> None:
        for module in self.quantized():
            module.active = active

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        quantized, codebook_loss, commitment, index = self.codebook(self.encoder(x))
        out = self.decoder(quantized)
        error = F.mse_loss(out, x)
        loss = error + codebook_loss + self.commitment * commitment
        return {"loss": loss, "error": error, "codebook": codebook_loss, "out": out, "index": index}


@torch.no_grad()
def perplexity(index: torch.Tensor, codes: int) -> float:
    share = torch.bincount(index, minlength=codes).float() / index.numel()
    return torch.exp(-(share * share.clamp(min=1e-10).log()).sum()).item()
