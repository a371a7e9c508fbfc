"""The network for u(t): its weights are given from outside in the inner loop."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call


class Sine(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.scale * x)


class GatedResidual(nn.Module):
    """x + a f(x), where a starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha * torch.tanh(self.linear(x))


class Field(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(1, width), Sine(1.5))
        self.blocks = nn.Sequential(*(GatedResidual(width) for _ in range(depth)))
        self.head = nn.Linear(width, 1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.features(t)))


class Bound:
    """A network together with the weights to use in it."""

    def __init__(self, net: nn.Module, weights: dict[str, torch.Tensor]):
        self.net, self.weights = net, weights

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        return functional_call(self.net, self.weights, (t,))
