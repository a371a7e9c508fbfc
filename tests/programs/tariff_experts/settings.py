"""Run settings with presets."""

import argparse
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MoEConfig:
    seed: int = 21
    steps: int = 30
    batch: int = 64
    features: int = 10
    width: int = 24
    experts: int = 4
    active: int = 2
    hidden: int = 32
    blocks: int = 2
    jitter: float = 0.05
    balance_rate: float = 0.02
    lr: float = 4e-3
    weight_decay: float = 0.0


PRESETS = {
    "base": MoEConfig(),
    "switch": MoEConfig(active=1, experts=6),
    "dense": MoEConfig(experts=2, active=2, jitter=0.0),
}


def from_args(argv=None):
    parser = argparse.ArgumentParser(description="mixture of experts for tariffs")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="switch")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    args = vars(parser.parse_args(argv))
    base = PRESETS[args.pop("preset")]
    return replace(base, **{k: v for k, v in args.items() if v is not None})
