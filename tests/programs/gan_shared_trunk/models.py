"""Generator and a critic whose two heads share a feature extractor."""
import copy

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class Generator(nn.Module):
    def __init__(self, noise, classes, hidden, width):
        super().__init__()
        self.noise = noise
        self.label = nn.Embedding(classes, noise)
        self.net = nn.Sequential(
            nn.Linear(2 * noise, hidden), nn.LayerNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width),
        )
        self.label.weight.data.mul_(0.5)

    def sample_noise(self, labels):
        return torch.randn(len(labels), self.noise)

    def forward(self, z, labels):
        return self.net(torch.cat([z, self.label(labels)], dim=1))


class Extractor(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.stages = nn.ModuleList([
            nn.Sequential(spectral_norm(nn.Linear(width, hidden)), nn.LeakyReLU(0.2)),
            nn.Sequential(spectral_norm(nn.Linear(hidden, hidden)), nn.LeakyReLU(0.2)),
        ])

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Critic(nn.Module):
    def __init__(self, width, hidden, classes):
        super().__init__()
        self.extractor = Extractor(width, hidden)
        self.real = nn.Linear(hidden, 1)
        self.kind = nn.Linear(hidden, classes)

    def forward(self, x):
        maps = self.extractor(x)
        return self.real(maps[-1]).squeeze(-1), self.kind(maps[-1]), maps


class Average:
    """Moving average of the generator, used for sampling."""

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        for slow, fast in zip(self.model.parameters(), model.parameters()):
            slow.lerp_(fast, 1.0 - self.decay)
