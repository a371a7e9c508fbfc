"""Small closed curves, one family per class."""
import math

import torch


class CurveSource:
    def __init__(self, classes, points, seed):
        self.classes = classes
        self.points = points
        self.gen = torch.Generator().manual_seed(seed)
        self.phase = torch.arange(points) * (2 * math.pi / points)

    @property
    def width(self):
        return 2 * self.points

    def labels(self, size):
        return torch.randint(self.classes, (size,), generator=self.gen)

    def batch(self, size):
        labels = self.labels(size)
        radius = 0.5 + 0.25 * labels[:, None] + 0.05 * torch.randn(size, 1, generator=self.gen)
        squash = 1.0 - 0.15 * labels[:, None]
        x = radius * torch.cos(self.phase)
        y = radius * squash * torch.sin(self.phase)
        return torch.cat([x, y], dim=1), labels
