"""Settings of the agent and its world."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field


@dataclass
class WorldConfig:
    nodes: int = 14
    slots: int = 4
    envs: int = 12
    limit: int = 10
    seed: int = 5


@dataclass
class PPOConfig:
    world: WorldConfig = field(default_factory=WorldConfig)
    width: int = 24
    rounds: int = 2
    horizon: int = 8
    iterations: int = 4
    epochs: int = 2
    minibatches: int = 3
    gamma: float = 0.95
    lam: float = 0.9
    clip: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    target_kl: float = 0.05
    lr: float = 3e-3
    max_norm: float = 0.5

    @property
    def total_updates(self) -> int:
        return self.iterations * self.epochs * self.minibatches


def parse(argv=None) -> PPOConfig:
    parser = argparse.ArgumentParser(description="PPO on a graph")
    parser.add_argument("--iterations", type=int, default=PPOConfig.iterations)
    parser.add_argument("--lr", type=float, default=PPOConfig.lr)
    args = parser.parse_args(argv)
    return PPOConfig(iterations=args.iterations, lr=args.lr)
