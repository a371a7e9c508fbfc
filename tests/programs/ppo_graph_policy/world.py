"""Walk on a random graph to a goal node, many walks at a time."""

from __future__ import annotations

import torch
from config import WorldConfig


class GraphWorld:
    """Each node has up to `slots` neighbours; some slots are empty and may not be chosen."""

    def __init__(self, cfg: WorldConfig):
        self.cfg = cfg
        self.rng = torch.Generator().manual_seed(cfg.seed)
        n, k = cfg.nodes, cfg.slots
        ring = torch.arange(n)
        table = torch.full((n, k), -1)
        table[:, 0], table[:, 1] = (ring + 1) % n, (ring - 1) % n
        for slot in range(2, k):
            chosen = torch.rand(n, generator=self.rng) < 0.6
            targets = torch.randint(0, n, (n,), generator=self.rng)
            table[:, slot] = torch.where(chosen & (targets != ring), targets, table[:, slot])
        self.table = table
        source = ring[:, None].expand(n, k)
        valid = table >= 0
        self.edges = torch.stack([source[valid], table[valid]])
        self.reset_all()

    def reset_all(self) -> None:
        self.place, self.goal = self._draw(self.cfg.envs), self._draw(self.cfg.envs)
        self.age = torch.zeros(self.cfg.envs, dtype=torch.long)

    def _draw(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.cfg.nodes, (count,), generator=self.rng)

    @property
    def observation(self) -> torch.Tensor:
        return torch.stack([self.place, self.goal], dim=1)

    @property
    def mask(self) -> torch.Tensor:
        return self.table[self.place] >= 0

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.place = self.table[self.place, action]
        self.age += 1
        arrived = self.place == self.goal
        done = arrived | (self.age >= self.cfg.limit)
        reward = torch.where(arrived, 1.0, -0.05)
        self.place = torch.where(done, self._draw(len(done)), self.place)
        self.goal = torch.where(done, self._draw(len(done)), self.goal)
        self.age[done] = 0
        return reward, done.float()
