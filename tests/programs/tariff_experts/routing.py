"""Token-choice routing with bias-based load balancing."""

from typing import NamedTuple

import torch
from torch import nn


class Route(NamedTuple):
    index: torch.Tensor
    weight: torch.Tensor
    load: torch.Tensor


class Router(nn.Module):
    """Scores every expert and keeps the best ``active`` ones of each row.

    The balance term shifts the choice only; it never enters the weights of the mixture.
    """

    def __init__(self, width, experts, active, jitter=0.0):
        super().__init__()
        self.active, self.jitter = active, jitter
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, experts, bias=False)
        self.register_buffer("balance", torch.zeros(experts))

    def _logits(self, x):
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.score(self.norm(x))

    def forward(self, x):
        logits = self._logits(x)
        with torch.no_grad():
            index = (logits + self.balance).topk(self.active, dim=-1).indices
        weight = logits.gather(-1, index).softmax(dim=-1)
        load = torch.bincount(index.flatten(), minlength=logits.shape[-1]).float()
        return Route(index, weight, load / load.sum())

    @torch.no_grad()
    def rebalance(self, load, rate):
        self.balance.add_(rate * torch.sign(1.0 / len(load) - load))


class RouterStats:
    """Callback: keeps a moving average of the load and moves the balance of every router."""

    def __init__(self, model, rate, momentum=0.8):
        self.routers = {n: m for n, m in model.named_modules() if isinstance(m, Router)}
        self.rate, self.momentum = rate, momentum
        self.average = {}

    def after_step(self, loads):
        for (name, router), load in zip(self.routers.items(), loads):
            load = load.detach()
            old = self.average.get(name, load)
            self.average[name] = self.momentum * old + (1 - self.momentum) * load
            router.rebalance(self.average[name], self.rate)

    def imbalance(self):
        return {n: round((v.max() * len(v)).item(), 2) for n, v in self.average.items()}
