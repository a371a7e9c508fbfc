"""Options of the language model run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass
class Options:
    vocab: int = 14
    width: int = 32
    layers: int = 2
    cell: str = "lstm"
    batch: int = 8
    window: int = 10
    length: int = 140
    accumulate: int = 2
    epochs: int = 3
    lr: float = 2e-2
    warmup: int = 3
    dropout: float = 0.15
    style_width: int = 8
    margin: float = 0.5
    style_weight: float = 1.0
    activity: float = 0.01
    slowness: float = 0.01
    clip: float = 1.0
    seed: int = 17

    @classmethod
    def parse(cls, argv=None) -> Options:
        parser = argparse.ArgumentParser(description="language model with truncated backpropagation")
        parser.add_argument("--cell", choices=("lstm", "gru"), default=cls.cell)
        parser.add_argument("--epochs", type=int, default=cls.epochs)
        parser.add_argument("--margin", type=float, default=cls.margin)
        return cls(**vars(parser.parse_args(argv)))
