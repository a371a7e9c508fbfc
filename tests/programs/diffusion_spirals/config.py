"""Settings of one denoising run on two-channel spiral images."""

import argparse
from dataclasses import dataclass, field, fields


@dataclass
class DiffusionConfig:
    timesteps: int = 50
    beta_start: float = 1e-4
    beta_end: float = 0.06
    prediction: str = "eps"


@dataclass
class EMAConfig:
    decay: float = 0.95
    warmup: int = 4


@dataclass
class Config:
    seed: int = 7
    image: int = 16
    width: int = 12
    batch: int = 8
    steps: int = 24
    eval_every: int = 10
    lr: float = 2e-3
    clip: float = 1.0
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)


def parse(argv=None):
    """Read the command line; nested groups keep their defaults."""
    parser = argparse.ArgumentParser(description="tiny diffusion U-Net")
    plain = [f for f in fields(Config) if f.type in (int, float, "int", "float")]
    for f in plain:
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default)
    return Config(**vars(parser.parse_args(argv)))
