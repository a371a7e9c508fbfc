"""Residual mixture-of-experts regressor."""

import torch
from torch import nn

from routing import Router


class Expert(nn.Sequential):
    def __init__(self, width, hidden, dropout=0.05):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))


class MoEBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.width)
        self.router = Router(cfg.width, cfg.experts, cfg.active, cfg.jitter)
        self.experts = nn.ModuleList(Expert(cfg.width, cfg.hidden) for _ in range(cfg.experts))
        self.shared = nn.Linear(cfg.width, cfg.width)

    def forward(self, x):
        h = self.norm(x)
        route = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            row, slot = (route.index == e).nonzero(as_tuple=True)
            if row.numel() == 0:
                continue
            out = out.index_add(0, row, route.weight[row, slot, None] * expert(h[row]))
        return x + out + self.shared(h), route.load


class TariffNet(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Linear(cfg.features, cfg.width)
        self.blocks = nn.ModuleList(MoEBlock(cfg) for _ in range(cfg.blocks))
        self.head = nn.Sequential(nn.LayerNorm(cfg.width), nn.Linear(cfg.width, 2))
        self.apply(self._init)

    @staticmethod
    def _init(m):
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight.data, std=0.2)
            if m.bias is not None:
                m.bias.data.zero_()

    def forward(self, x):
        h, loads = self.embed(x), []
        for block in self.blocks:
            h, load = block(h)
            loads.append(load)
        mean, log_scale = self.head(h).unbind(-1)
        return mean, log_scale.clamp(-4, 3), loads
