"""A small convolutional net whose features are standardised before they are classified."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStandardise(nn.Module):
    """Shifts and scales features by running statistics, so that the head sees the same range all through training."""

    def __init__(self, width: int, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x.detach()  # the statistics are no part of the graph
            self.mean.lerp_(x.mean(0), self.momentum)
            self.std.lerp_(x.std(0), self.momentum)
        return (x - self.mean) / (self.std + 1e-3)


class DigitNet(nn.Module):
    """Classifies images of shape [n, 1, 8, 8]."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width // 2, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width // 2, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.norm = RunningStandardise(4 * width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(images)))
