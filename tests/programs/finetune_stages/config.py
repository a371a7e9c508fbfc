"""Stages of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    lr: float
    unfreeze: tuple[str, ...] = ()
    auxiliary: bool = False
    distill: float = 0.0
    control: bool = False


@dataclass(frozen=True)
class Plan:
    image: int = 10
    width: int = 16
    classes: int = 4
    source_classes: int = 3
    batch: int = 16
    pretrain_steps: int = 6
    pretrain_lr: float = 5e-3
    weight_decay: float = 0.01
    temperature: float = 2.0
    seed: int = 8
    stages: tuple[Stage, ...] = field(
        default=(
            Stage("head", 7, lr=1e-2, unfreeze=("head", "orientation"), auxiliary=True),
            Stage(
                "top", steps=7, lr=3e-3, unfreeze=("backbone.stages.1", "control"), distill=0.5, control=True
            ),
            Stage("full", 7, lr=1e-3, unfreeze=("backbone",), distill=0.25, control=True),
        )
    )
