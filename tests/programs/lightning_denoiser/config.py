"""Settings of the signal denoiser."""
from dataclasses import dataclass


@dataclass(frozen=True)
class DenoiserConfig:
    length: int = 32
    channels: int = 12
    batch_size: int = 16
    train_size: int = 96
    val_size: int = 32
    noise: float = 0.3
    lr: float = 3e-3
    max_epochs: int = 3
    clip: float = 1.0
    spectral_weight: float = 0.1
    smooth_prefixes: tuple = ("decoder.",)
    smooth_beta: float = 0.5
    seed: int = 7
