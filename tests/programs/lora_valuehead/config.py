"""Settings of the adapter run."""
from dataclasses import dataclass


@dataclass
class AdapterConfig:
    rank: int = 4
    alpha: int = 8
    dropout: float = 0.05
    targets: tuple = ("c_attn", "c_proj")


@dataclass
class TuneConfig:
    vocab_size: int = 64
    positions: int = 24
    width: int = 32
    layers: int = 2
    heads: int = 2
    batch_size: int = 8
    seq_len: int = 12
    steps: int = 20
    lr: float = 5e-3
    head_lr: float = 1e-2
    clip: float = 1.0
    value_weight: float = 0.5
    warmup: int = 3
    preview_at: tuple = (8, 16)
    preview_tokens: int = 6
    seed: int = 21
