"""Families of ordinary differential equations with known solutions."""

from __future__ import annotations

import abc
import math
import random

import torch

FAMILIES: dict[str, type[Problem]] = {}


def family(cls: type[Problem]) -> type[Problem]:
    FAMILIES[cls.__name__.lower()] = cls
    return cls


def derivative(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """du/dt, itself differentiable."""
    return torch.autograd.grad(u, t, grad_outputs=torch.ones_like(u), create_graph=True)[0]


class Problem(abc.ABC):
    """One task: an equation with drawn coefficients on [0, 1]."""

    boundary_weight: float = 1.0

    def __init__(self, rng: random.Random):
        self.start = rng.uniform(0.5, 1.5)

    @abc.abstractmethod
    def residual(self, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...

    @abc.abstractmethod
    def solution(self, t: torch.Tensor) -> torch.Tensor: ...

    def boundary(self, model, slope: bool = False) -> torch.Tensor:
        zero = torch.zeros(1, 1, requires_grad=True)
        u = model(zero)
        term = (u - self.start).square().sum()
        if slope:
            term = term + derivative(u, zero).square().sum()
        return term

    def loss(self, model, t: torch.Tensor) -> torch.Tensor:
        t = t.detach().requires_grad_(True)
        u = model(t)
        return self.residual(u, t).square().mean() + self.boundary_weight * self.boundary(model)

    @torch.no_grad()
    def error(self, model) -> float:
        t = torch.linspace(0, 1, 33).unsqueeze(1)
        return (model(t) - self.solution(t)).abs().mean().item()


@family
class Decay(Problem):
    """u' + k u = 0."""

    def __init__(self, rng: random.Random):
        super().__init__(rng)
        self.rate = rng.uniform(0.5, 2.0)

    def residual(self, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return derivative(u, t) + self.rate * u

    def solution(self, t: torch.Tensor) -> torch.Tensor:
        return self.start * torch.exp(-self.rate * t)


@family
class Oscillator(Problem):
    """u'' + w^2 u = 0 with zero slope at the start."""

    def __init__(self, rng: random.Random):
        super().__init__(rng)
        self.frequency = rng.uniform(0.5, 1.0) * math.pi / 2

    def residual(self, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return derivative(derivative(u, t), t) + self.frequency**2 * u

    def boundary(self, model, slope: bool = True) -> torch.Tensor:
        return super().boundary(model, slope=slope)

    def solution(self, t: torch.Tensor) -> torch.Tensor:
        return self.start * torch.cos(self.frequency * t)


class TaskSource:
    def __init__(self, name: str, seed: int, boundary_weight: float):
        self.rng = random.Random(seed)
        self.kinds = list(FAMILIES.values()) if name == "mixed" else [FAMILIES[name]]
        self.boundary_weight = boundary_weight

    def draw(self, count: int) -> list[Problem]:
        tasks = [self.kinds[i % len(self.kinds)](self.rng) for i in range(count)]
        for task in tasks:
            task.boundary_weight = self.boundary_weight
        return tasks
