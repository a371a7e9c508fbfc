"""Three trainers run freely while the main thread turns the switch; plain torch then says which steps were partial."""

from __future__ import annotations

import copy
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import gradctl


class Residual(nn.Module):
    """A small residual net: a cut inside a branch leaves the parameters behind it a way around."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.inputs = nn.Linear(6, 8)
        self.branches = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)])
        self.head = nn.Linear(8, 6)
        if tied:
            self.head.weight = nn.Parameter(self.inputs.weight.detach().t().contiguous().clone())
            self.branches[2] = self.branches[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inputs(x)
        for branch in self.branches:
            h = h + branch(h)
        return self.head(h).square().mean()


def plain_forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run `Residual` without its own `__call__`: module-free code as far as a stack shows."""
    h = torch.nn.functional.linear(x, net.inputs.weight, net.inputs.bias)
    for first, _, second in net.branches:
        inner = torch.nn.functional.linear(h, first.weight, first.bias).relu()
        h = h + torch.nn.functional.linear(inner, second.weight, second.bias)
    return torch.nn.functional.linear(h, net.head.weight, net.head.bias).square().mean()


@dataclass
class Step:
    """One step that reached its optimizer."""

    before: dict[str, torch.Tensor]
    batch: torch.Tensor
    grads: list[torch.Tensor | None]
    noticed: bool

    def is_partial(self, net: nn.Module) -> bool:
        """Compare with the gradients that plain torch computes for the same weights and batch."""
        oracle = copy.deepcopy(net)
        oracle.load_state_dict(self.before)
        oracle.zero_grad()
        oracle(self.batch).backward()
        return any(
            got is None or not torch.equal(got, p.grad) for got, p in zip(self.grads, oracle.parameters(), strict=True)
        )


@dataclass
class Race:
    """What came out.

    Args:
        steps: how many reached the optimizer.
        partial: how many of them had partial gradients.
        noticed: how many of the partial ones were stopped.
        false_alarms: how many whole ones were stopped.
        toggles: how often gradients were switched off.
        died: steps that ended in an error of their own, because no operation of theirs was recorded.
    """

    steps: int = 0
    partial: int = 0
    noticed: int = 0
    false_alarms: int = 0
    toggles: int = 0
    died: int = 0
    missed_sites: list[str] = field(default_factory=list)


def run(seconds: float, *, seed: int, functional: bool = False, adam: bool = False, tied: bool = False) -> Race:
    """Let three trainers run against a main thread that switches at random."""
    race, stop = Race(), threading.Event()
    rng = random.Random(seed)
    nets = [Residual(tied=tied) for _ in range(3)]
    recorded: list[list[Step]] = [[] for _ in nets]

    def train(index: int) -> None:
        net, generator = nets[index], torch.Generator().manual_seed(seed + index)
        parameters = list(net.parameters())
        optimizer: Any = torch.optim.Adam(parameters, lr=1e-3) if adam else torch.optim.SGD(parameters, lr=1e-3)
        while not stop.is_set():
            batch = torch.randn(4, 6, generator=generator)
            before = {name: value.clone() for name, value in net.state_dict().items()}
            optimizer.zero_grad()
            try:
                (plain_forward(net, batch) if functional else net(batch)).backward()
            except RuntimeError:
                race.died += 1
                continue
            grads = [None if p.grad is None else p.grad.clone() for p in parameters]
            try:
                optimizer.step()
                noticed = False
            except gradctl.TornStep:
                noticed = True
            recorded[index].append(Step(before, batch, grads, noticed))

    threads = [threading.Thread(target=train, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(rng.uniform(0.0, 0.01))
        with gradctl.off(strict=True):
            time.sleep(rng.choice([0.0, 0.0002, 0.001, 0.003]))
        race.toggles += 1
    stop.set()
    for thread in threads:
        thread.join()
    for net, steps in zip(nets, recorded, strict=True):
        for step in steps:
            partial = step.is_partial(net)
            race.steps += 1
            race.partial += partial
            race.noticed += partial and step.noticed
            race.false_alarms += step.noticed and not partial
    return race
