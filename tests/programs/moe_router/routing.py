"""Noisy top-k routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from config import RouterConfig
from torch import nn


@dataclass
class Routing:
    index: torch.Tensor
    weight: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor
    load: torch.Tensor


class NoisyTopK(nn.Module):
    """Chooses k experts per token; noise with a learned scale helps it explore in training."""

    def __init__(self, width: int, cfg: RouterConfig):
        super().__init__()
        self.cfg = cfg
        self.gate = nn.Linear(width, cfg.experts, bias=False)
        self.noise = nn.Linear(width, cfg.experts, bias=False)
        nn.init.normal_(self.gate.weight, std=0.3)
        nn.init.zeros_(self.noise.weight)

    def forward(self, tokens: torch.Tensor) -> Routing:
        clean = self.gate(tokens)
        logits = clean
        if self.training:
            logits = clean + torch.randn_like(clean) * F.softplus(self.noise(tokens) - 1.0)
        probs = logits.softmax(dim=-1)
        top, index = probs.topk(self.cfg.top_k, dim=-1)
        weight = top / top.sum(dim=-1, keepdim=True)
        chosen = F.one_hot(index, self.cfg.experts).sum(dim=1)
        share = chosen.float().mean(dim=0) / self.cfg.top_k
        balance = self.cfg.experts * (share * probs.mean(dim=0)).sum()
        return Routing(index, weight, balance, clean.logsumexp(dim=-1).square().mean(), chosen.sum(dim=0))


class Expert(nn.Sequential):
    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MixtureOfExperts(nn.Module):
    """Tokens above an expert's capacity skip it; experts without tokens are not called."""

    def __init__(self, width: int, hidden: int, cfg: RouterConfig):
        super().__init__()
        self.cfg = cfg
        self.router = NoisyTopK(width, cfg)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(cfg.experts))
        self.register_buffer("usage", torch.zeros(cfg.experts, dtype=torch.long), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        limit = max(1, int(self.cfg.capacity * self.cfg.top_k * len(tokens) / self.cfg.experts))
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, slot = (routing.index == number).nonzero(as_tuple=True)
            rows, slot = rows[:limit], slot[:limit]
            if rows.numel() == 0:
                continue
            share = routing.weight[rows, slot].unsqueeze(-1)
            out = out.index_add(0, rows, share * expert(tokens[rows]))
        if self.training:
            self.usage += routing.load
        penalty = self.cfg.balance_weight * routing.balance + self.cfg.z_weight * routing.z
        return out.view_as(x), penalty
