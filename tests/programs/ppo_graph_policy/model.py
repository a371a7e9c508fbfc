"""Actor and critic on one graph network with max aggregation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from config import PPOConfig
from torch import nn
from torch.distributions import Categorical


class MaxConv(nn.Module):
    """Message passing where each channel of a node takes its largest incoming message."""

    def __init__(self, width: int):
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.update = nn.GRUCell(width, width)

    def forward(self, h: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        batch, nodes, width = h.shape
        source, target = edges
        messages = self.message(torch.cat([h[:, source], h[:, target]], dim=-1))
        index = target.view(1, -1, 1).expand_as(messages)
        pooled = torch.zeros_like(h).scatter_reduce(1, index, messages, "amax", include_self=False)
        return self.update(pooled.reshape(-1, width), h.reshape(-1, width)).view(batch, nodes, width)


class ActorCritic(nn.Module):
    def __init__(self, cfg: PPOConfig, edges: torch.Tensor, table: torch.Tensor):
        super().__init__()
        self.register_buffer("edges", edges)
        self.register_buffer("table", table)
        self.embed = nn.Embedding(cfg.world.nodes, cfg.width)
        self.marks = nn.Parameter(0.5 * torch.randn(2, cfg.width))
        self.convs = nn.ModuleList(MaxConv(cfg.width) for _ in range(cfg.rounds))
        self.query = nn.Linear(cfg.width, cfg.width)
        self.key = nn.Linear(cfg.width, cfg.width, bias=False)
        self.value = nn.Sequential(nn.Linear(2 * cfg.width, cfg.width), nn.Tanh(), nn.Linear(cfg.width, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        self.value[-1].weight.data.zero_()
        self.value[-1].bias.data.zero_()

    def encode(self, obs: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(obs.shape[0])
        marks = torch.zeros(obs.shape[0], *self.embed.weight.shape)
        for which in range(2):
            marks = marks.index_put((rows, obs[:, which]), self.marks[which], accumulate=True)
        h = self.embed.weight + marks
        for conv in self.convs:
            h = h + conv(h, self.edges)
        return h

    def forward(self, obs: torch.Tensor, mask: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        h, rows = self.encode(obs), torch.arange(obs.shape[0])
        here = h[rows, obs[:, 0]]
        around = h[rows[:, None], self.table[obs[:, 0]].clamp(min=0)]
        logits = torch.einsum("bd,bkd->bk", self.query(here), self.key(around)) / h.shape[-1] ** 0.5
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        value = self.value(torch.cat([here, h.amax(dim=1)], dim=-1)).squeeze(-1)
        return Categorical(logits=F.log_softmax(logits, dim=-1)), value
