"""Settings of a run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields


@dataclass
class Config:
    latent: int = 12
    classes: int = 4
    width: int = 24
    image: int = 12
    batch: int = 16
    steps: int = 14
    lr_g: float = 2e-3
    lr_d: float = 2e-3
    penalty_weight: float = 5.0
    penalty_every: int = 2
    feature_weight: float = 0.5
    class_weight: float = 0.3
    ema_decay: float = 0.9
    blocks: int = 2
    eval_every: int = 5
    seed: int = 3

    @classmethod
    def from_args(cls, argv=None) -> Config:
        parser = argparse.ArgumentParser(description="class-conditional GAN on synthetic blobs")
        for f in fields(cls):
            parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default)
        return cls(**vars(parser.parse_args(argv)))
