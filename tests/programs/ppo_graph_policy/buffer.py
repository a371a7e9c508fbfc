"""What the agent saw, and the advantages computed from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class Transition:
    obs: torch.Tensor
    mask: torch.Tensor
    action: torch.Tensor
    logp: torch.Tensor
    value: torch.Tensor
    reward: torch.Tensor
    done: torch.Tensor


class Rollout:
    def __init__(self):
        self.items: list[Transition] = []

    def add(self, **values: torch.Tensor) -> None:
        self.items.append(Transition(**values))

    def stacked(self, name: str) -> torch.Tensor:
        return torch.stack([getattr(item, name) for item in self.items])

    def advantages(self, last_value: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
        """Generalised advantage estimates, newest first and then turned round."""
        running, following, out = torch.zeros_like(last_value), last_value, []
        for item in reversed(self.items):
            alive = 1.0 - item.done
            delta = item.reward + gamma * following * alive - item.value
            running = delta + gamma * lam * alive * running
            following = item.value
            out.append(running)
        return torch.stack(out[::-1])

    def minibatches(self, advantage: torch.Tensor, parts: int) -> Iterator[dict[str, torch.Tensor]]:
        flat = {n: self.stacked(n).flatten(0, 1) for n in ("obs", "mask", "action", "logp", "value")}
        flat["advantage"] = advantage.flatten()
        flat["returns"] = flat["advantage"] + flat["value"]
        for chunk in torch.randperm(flat["action"].numel()).chunk(parts):
            yield {name: tensor[chunk] for name, tensor in flat.items()}
