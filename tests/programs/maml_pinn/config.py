"""Settings; the registry of problem families is in `problems`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass
class MetaConfig:
    family: str = "mixed"
    width: int = 20
    depth: int = 2
    inner_steps: int = 2
    inner_lr: float = 0.02
    outer_lr: float = 3e-3
    tasks: int = 3
    points: int = 16
    iterations: int = 14
    first_order_until: int = 5
    boundary_weight: float = 4.0
    clip: float = 2.0
    seed: int = 2


def load(argv=None) -> MetaConfig:
    parser = argparse.ArgumentParser(description="meta-learn an initialisation for differential equations")
    parser.add_argument("--family", default=MetaConfig.family)
    parser.add_argument("--iterations", type=int, default=MetaConfig.iterations)
    parser.add_argument("--first-order-until", type=int, default=MetaConfig.first_order_until)
    return MetaConfig(**vars(parser.parse_args(argv)))
