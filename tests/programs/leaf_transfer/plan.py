"""The stages of a transfer run."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass
class Stage:
    name: str
    epochs: int
    train: tuple
    lr: float
    scale: dict = field(default_factory=dict)

    def matches(self, parameter_name):
        return any(fnmatchcase(parameter_name, pattern) for pattern in self.train)

    def factor(self, parameter_name):
        for prefix, value in self.scale.items():
            if parameter_name.startswith(prefix):
                return value
        return 1.0


def default_plan():
    """First the head alone, then everything, with smaller steps further down."""
    return [
        Stage("head", epochs=2, train=("head.*",), lr=2e-2),
        Stage("all", epochs=3, train=("*",), lr=5e-3,
              scale={"backbone.stem": 0.25, "backbone.stage1": 0.5, "backbone.stage2": 0.75}),
    ]
