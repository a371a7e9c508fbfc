"""Settings of the conditional GAN."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TermConfig:
    weight: float
    start: int = 0
    cap: float = None


@dataclass
class GanConfig:
    noise: int = 8
    classes: int = 4
    points: int = 6
    hidden: int = 24
    batch_size: int = 24
    steps: int = 24
    lr_g: float = 2e-3
    lr_d: float = 2e-3
    betas: tuple = (0.5, 0.99)
    ema: float = 0.95
    seed: int = 5
    generator_terms: dict = field(default_factory=lambda: {
        "adversarial": TermConfig(1.0),
        "class": TermConfig(0.5),
        "features": TermConfig(2.0, cap=4.0),
        "diversity": TermConfig(0.1, start=4),
    })
    critic_terms: dict = field(default_factory=lambda: {
        "adversarial": TermConfig(1.0),
        "class": TermConfig(0.5),
        "r1": TermConfig(0.2),
    })
