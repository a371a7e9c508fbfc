"""Encoders of the three modalities and the towers around them."""
import torch
import torch.nn.functional as F
from torch import nn

from codec import build_codec


class ConvEncoder(nn.Module):
    def __init__(self, cfg, embed):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(),
            nn.Linear(16 * (cfg.size // 4) ** 2, embed),
        )

    def forward(self, x):
        return self.net(x)


class TokenEncoder(nn.Module):
    def __init__(self, cfg, embed):
        super().__init__()
        self.embedding = nn.Embedding(cfg.size, cfg.hidden, padding_idx=0)
        self.mix = nn.Sequential(nn.LayerNorm(cfg.hidden), nn.Linear(cfg.hidden, embed))
        self.embedding.weight.data.mul_(0.5)

    def forward(self, tokens):
        keep = (tokens != 0).unsqueeze(-1).float()
        mean = (self.embedding(tokens) * keep).sum(1) / keep.sum(1).clamp_min(1.0)
        return self.mix(mean)


class SpectrumEncoder(nn.Module):
    def __init__(self, cfg, embed):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(cfg.size, cfg.hidden), nn.GELU(), nn.Dropout(0.05), nn.Linear(cfg.hidden, embed),
        )

    def forward(self, x):
        return self.net(x)


ENCODERS = {"conv": ConvEncoder, "tokens": TokenEncoder, "spectrum": SpectrumEncoder}


class Tower(nn.Module):
    def __init__(self, cfg, embed, project):
        super().__init__()
        self.encoder = ENCODERS[cfg.kind](cfg, embed)
        self.codec = build_codec(cfg.codec, cfg.bits)
        self.projection = nn.Sequential(nn.LayerNorm(embed), nn.Linear(embed, project))

    def forward(self, x):
        return F.normalize(self.projection(self.codec(self.encoder(x))), dim=-1)


class MultiModal(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.towers = nn.ModuleDict({
            name: Tower(tower, cfg.embed, cfg.project) for name, tower in cfg.towers.items()
        })
        self.log_temperature = nn.Parameter(torch.tensor(0.2).log())

    def forward(self, batch):
        return {name: self.towers[name](x) for name, x in batch.items()}

    @property
    def temperature(self):
        return self.log_temperature.exp().clamp(0.02, 1.0)
