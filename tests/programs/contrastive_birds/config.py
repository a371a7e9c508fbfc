"""Settings of the three-way contrastive run."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TowerConfig:
    kind: str
    size: int
    hidden: int = 32
    codec: str = "none"
    bits: int = 8
    lr_scale: float = 1.0


def default_towers():
    return {
        "image": TowerConfig(kind="conv", size=8, codec="straight_through", bits=6),
        "caption": TowerConfig(kind="tokens", size=40, lr_scale=0.5),
        "audio": TowerConfig(kind="spectrum", size=24, codec="packed"),
    }


@dataclass
class ContrastiveConfig:
    towers: dict = field(default_factory=default_towers)
    embed: int = 16
    project: int = 16
    species: int = 8
    batch_size: int = 16
    steps: int = 24
    lr: float = 4e-3
    weight_decay: float = 1e-3
    warmup: int = 4
    pairs: tuple = (("image", "caption"), ("image", "audio"), ("caption", "audio"))
    queue: int = 32
    ema: float = 0.9
    seed: int = 29
