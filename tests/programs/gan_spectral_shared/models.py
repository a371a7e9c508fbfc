"""Generator with gated residual blocks, and a critic that shares one trunk between two heads."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


def sn(module: nn.Module) -> nn.Module:
    return spectral_norm(module, n_power_iterations=1)


class ConditionalNorm(nn.Module):
    """Normalises without affine parameters, then scales and shifts by class."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels, affine=False)
        self.embed = nn.Embedding(classes, 2 * channels)
        self.embed.weight.data[:, :channels].normal_(1.0, 0.02)
        self.embed.weight.data[:, channels:].zero_()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scale, shift = self.embed(y).chunk(2, dim=1)
        return self.norm(x) * scale[..., None, None] + shift[..., None, None]


class GatedBlock(nn.Module):
    """Residual block whose branch is scaled by a gate that starts at zero."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.norm1 = ConditionalNorm(channels, classes)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = ConditionalNorm(channels, classes)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x, y)))
        h = self.conv2(F.silu(self.norm2(h, y)))
        return x + self.gate * h


class Generator(nn.Module):
    def __init__(self, latent: int, classes: int, width: int, image: int, blocks: int):
        super().__init__()
        self.latent, self.side, self.width = latent, image // 2, width
        self.embed = nn.Embedding(classes, latent)
        self.stem = nn.Linear(2 * latent, width * self.side**2)
        self.blocks = nn.ModuleList(GatedBlock(width, classes) for _ in range(blocks))
        self.out = nn.Conv2d(width, 1, 3, padding=1)

    @property
    def device(self) -> torch.device:
        return self.stem.weight.device

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.stem(torch.cat([z, self.embed(y)], dim=1)).view(-1, self.width, self.side, self.side)
        for block in self.blocks:
            h = block(h, y)
        h = F.interpolate(F.silu(h), scale_factor=2, mode="nearest")
        return torch.tanh(self.out(h))

    def sample(self, count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(0, classes, (count,), device=self.device)
        return self(torch.randn(count, self.latent, device=self.device), y), y


class Critic(nn.Module):
    """A spectrally normalised trunk with an adversarial head and a class head."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.conv1 = sn(nn.Conv2d(1, width, 3, stride=2, padding=1))
        self.conv2 = sn(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.fc = sn(nn.Linear(width, width))
        self.adversarial = sn(nn.Linear(width, 1))
        self.classifier = nn.Linear(width, classes)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        a = F.softplus(self.conv1(x), beta=4)
        b = F.softplus(self.conv2(a), beta=4)
        return [a, b, F.softplus(self.fc(b.mean(dim=(2, 3))), beta=4)]

    def score(self, feats: list[torch.Tensor]) -> torch.Tensor:
        return self.adversarial(feats[-1]).squeeze(1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        feats = self.features(x)
        return self.score(feats), self.classifier(feats[-1]), feats


class Averaged(nn.Module):
    """Exponential moving average of a module, for evaluation."""

    def __init__(self, module: nn.Module, decay: float):
        super().__init__()
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        for mine, theirs in zip(self.module.parameters(), source.parameters(), strict=True):
            mine.lerp_(theirs, 1.0 - self.decay)
        for mine, theirs in zip(self.module.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)
