"""Settings of the class-incremental run."""
from dataclasses import dataclass, field


@dataclass
class Stage:
    name: str
    classes: int
    epochs: int
    per_class: int = 24


@dataclass
class IncrementalConfig:
    stages: list = field(default_factory=lambda: [Stage("base", 3, 1), Stage("extended", 5, 2)])
    features: int = 20
    hidden: int = 32
    embed: int = 16
    batch_size: int = 12
    accumulate: int = 2
    lr: float = 2e-2
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 2.0
    distill_weight: float = 0.5
    temperature: float = 2.0
    seed: int = 3
