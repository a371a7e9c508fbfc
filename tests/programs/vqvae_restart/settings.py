"""Settings and their command line."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass


@dataclass
class Settings:
    image: int = 12
    width: int = 20
    code_dim: int = 6
    codes: int = 24
    commitment: float = 0.25
    bits: int = 6
    quantize_from: int = 6
    batch: int = 12
    steps: int = 16
    lr: float = 4e-3
    restart_every: int = 4
    restart_below: int = 2
    kinds: int = 3
    seed: int = 21


def parse_settings(argv=None) -> Settings:
    parser = argparse.ArgumentParser()
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return Settings(**vars(parser.parse_args(argv)))
