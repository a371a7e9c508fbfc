"""Run settings; one entry per method in the registry of presets."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    method: str = "byol"
    dim: int = 40
    clusters: int = 5
    hidden: int = 48
    embed: int = 24
    proj: int = 16
    depth: int = 2
    batch: int = 32
    steps: int = 12
    lr: float = 3e-3
    weight_decay: float = 1e-4
    momentum: float = 0.95
    probe_weight: float = 1.0
    warmup: int = 3
    knn: int = 5
    seed: int = 11


PRESETS = {
    "byol": Settings(),
    "simsiam": Settings(method="simsiam", momentum=0.0, lr=2e-3),
}


def preset(name: str, **overrides) -> Settings:
    return replace(PRESETS[name], **{k: v for k, v in overrides.items() if v is not None})
