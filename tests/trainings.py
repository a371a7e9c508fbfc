"""Small trainings in plain torch, and what they measure of themselves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gradctl._journal import Journal


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 20, generator=generator), torch.randint(0, 3, (16,), generator=generator))
        for _ in range(count)
    ]


def train_mlp(steps: int = 12, accumulate: int = 1, clip: float | None = None) -> tuple[list[float], list[Tensor]]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for number, (x, y) in enumerate(batches(steps * accumulate), 1):
        loss = nn.functional.cross_entropy(model(x), y) / accumulate
        loss.backward()
        losses.append(loss.item())
        if number % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses, [p.detach().clone() for p in model.parameters()]


def measured_by_hand(model: nn.Module, steps: int, lr: float = 0.05) -> tuple[list[Any], list[Any], list[float]]:
    """Norms, update ratios and cosines of full tensors, by plain torch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    norms: list[Any] = []
    ratios: list[Any] = []
    cosines: list[float] = []
    last: Tensor | None = None
    for x, y in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        grads = [p.grad.detach().double().clone() for p in model.parameters() if p.grad is not None]
        before = [p.detach().double().clone() for p in model.parameters()]
        optimizer.step()
        norms.append([float(g.norm()) for g in grads])
        ratios.append(
            [
                float((p.detach().double() - b).norm() / b.norm())
                for p, b in zip(model.parameters(), before, strict=True)
            ]
        )
        flat = torch.cat([g.flatten() for g in grads])
        cosines.append(float(nn.functional.cosine_similarity(flat, last, dim=0)) if last is not None else math.nan)
        last = flat
    return norms, ratios, cosines


def poisoned(at: int, steps: int = 12, value: float = math.nan) -> list[Tensor]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (x, y) in enumerate(batches(steps), 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if number == at:
            model[2].weight.grad[1, 5] = value  # type: ignore[index, union-attr]
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def losses_of(journal: Journal) -> list[float]:
    return [block.loss[0] for block in journal.blocks if block.loss]
