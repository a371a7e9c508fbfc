"""Encoder, heads and the two self-supervised methods."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from config import Settings
from torch import nn

METHODS: dict[str, type[SelfSupervised]] = {}


def register(name: str):
    def wrap(cls):
        METHODS[name] = cls
        return cls

    return wrap


class ScaledResidual(nn.Module):
    """Residual layer with a per-channel scale that starts very small."""

    def __init__(self, width: int, init: float = 1e-4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


def mlp(inputs: int, hidden: int, outputs: int, last_norm: bool) -> nn.Sequential:
    layers = [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(hidden, outputs))
    if last_norm:
        layers.append(nn.BatchNorm1d(outputs, affine=False))
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    def __init__(self, cfg: Settings):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(cfg.dim, cfg.hidden), nn.BatchNorm1d(cfg.hidden), nn.GELU())
        self.blocks = nn.Sequential(*(ScaledResidual(cfg.hidden) for _ in range(cfg.depth)))
        self.out = nn.Linear(cfg.hidden, cfg.embed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks(self.stem(x)))


class SelfSupervised(nn.Module):
    """Base: online encoder, projector, predictor, and a probe on frozen features."""

    def __init__(self, cfg: Settings):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.projector = mlp(cfg.embed, cfg.hidden, cfg.proj, last_norm=True)
        self.predictor = mlp(cfg.proj, cfg.hidden // 2, cfg.proj, last_norm=False)
        self.probe = nn.Linear(cfg.embed, cfg.clusters)

    def targets(self, views: list[torch.Tensor], online: list[torch.Tensor]) -> list[torch.Tensor]:
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called once per optimizer step."""

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, a: torch.Tensor, b: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        features = [self.encoder(v) for v in (a, b)]
        projected = [self.projector(f) for f in features]
        targets = self.targets([a, b], projected)
        predicted = [self.predictor(p) for p in projected]
        similarity = cosine(predicted[0], targets[1]) + cosine(predicted[1], targets[0])
        logits = self.probe(features[0].detach())
        return {
            "align": 2.0 - similarity,
            "probe": F.cross_entropy(logits, label),
            "accuracy": (logits.detach().argmax(dim=1) == label).float().mean(),
            "spread": F.normalize(projected[0].detach(), dim=1).std(dim=0).mean(),
        }


def cosine(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(prediction, target, dim=1).mean()


@register("byol")
class Byol(SelfSupervised):
    """The target is a slow copy of encoder and projector."""

    def __init__(self, cfg: Settings):
        super().__init__(cfg)
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector)).requires_grad_(False)

    @torch.no_grad()
    def targets(self, views: list[torch.Tensor], online: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.target(v) for v in views]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        base = self.cfg.momentum
        decay = 1.0 - (1.0 - base) * (math.cos(math.pi * progress) + 1.0) / 2.0
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        for slow, fast in zip(self.target.parameters(), online, strict=True):
            slow.data.mul_(decay).add_(fast.data, alpha=1.0 - decay)


@register("simsiam")
class SimSiam(SelfSupervised):
    """The target is the other view's projection, without its gradient."""

    def targets(self, views: list[torch.Tensor], online: list[torch.Tensor]) -> list[torch.Tensor]:
        return [p.detach() for p in online]
