"""The inner loop."""

from __future__ import annotations

import torch
from model import Bound, Field
from problems import Problem
from torch import nn


class MetaLearner(nn.Module):
    """An initialisation and one learned step size per tensor."""

    def __init__(self, net: Field, inner_lr: float, steps: int):
        super().__init__()
        self.net, self.steps = net, steps
        self.names = [name for name, _ in net.named_parameters()]
        self.log_lr = nn.ParameterList(nn.Parameter(torch.tensor(inner_lr).log()) for _ in self.names)

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.net.named_parameters())

    def adapt(self, task: Problem, points: torch.Tensor, first_order: bool) -> dict[str, torch.Tensor]:
        """Adapted weights as functions of the initialisation.

        With `first_order` the inner gradients are constants; the path through the weights stays.
        """
        fast = self.weights()
        for _ in range(self.steps):
            loss = task.loss(Bound(self.net, fast), points)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            if first_order:
                grads = [g.detach() for g in grads]
            fast = {
                name: weight - rate.exp() * grad
                for (name, weight), rate, grad in zip(fast.items(), self.log_lr, grads, strict=True)
            }
        return fast

    def meta_loss(self, task: Problem, support: torch.Tensor, query: torch.Tensor, first_order: bool):
        fast = self.adapt(task, support, first_order)
        return task.loss(Bound(self.net, fast), query)

    def adapted_error(self, task: Problem, points: torch.Tensor) -> tuple[float, float]:
        """Error against the solution before and after adaptation; keeps no graph."""
        before = task.error(self.net)
        fast = {k: v.detach() for k, v in self.adapt(task, points, first_order=True).items()}
        return before, task.error(Bound(self.net, fast))
