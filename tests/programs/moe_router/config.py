"""Configuration as nested dataclasses."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field


@dataclass
class RouterConfig:
    experts: int = 10
    top_k: int = 2
    capacity: float = 2.0
    balance_weight: float = 0.02
    z_weight: float = 1e-3


@dataclass
class ModelConfig:
    vocab: int = 24
    length: int = 8
    width: int = 24
    heads: int = 2
    layers: int = 2
    hidden: int = 32
    classes: int = 3
    dropout: float = 0.1
    checkpoint: bool = True
    router: RouterConfig = field(default_factory=RouterConfig)


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: int = 2
    accumulate: int = 2
    steps: int = 24
    lr: float = 5e-3
    eval_every: int = 8
    seed: int = 13


def read(argv=None) -> TrainConfig:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--experts", type=int, default=RouterConfig.experts)
    args = parser.parse_args(argv)
    router = RouterConfig(experts=args.experts)
    return TrainConfig(model=ModelConfig(router=router), steps=args.steps)
