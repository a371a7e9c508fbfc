"""Coordinate network with fixed random Fourier features and adaptive activations."""

import torch
from torch import nn


class FourierFeatures(nn.Module):
    def __init__(self, inputs, count, scale, generator):
        super().__init__()
        self.register_buffer("freq", scale * torch.randn(inputs, count, generator=generator))

    def forward(self, z):
        angle = z @ self.freq
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class AdaptiveTanh(nn.Module):
    """tanh with a trainable slope."""

    def __init__(self, scale=5.0):
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.tensor(1.0 / scale))

    def forward(self, x):
        return torch.tanh(self.scale * self.a * x)


class WaveNet(nn.Module):
    def __init__(self, width=32, depth=3, features=16, scale=4.0, span=(6.0, 0.5), seed=0):
        super().__init__()
        gen = torch.Generator().manual_seed(seed)
        self.register_buffer("span", torch.tensor(span))
        self.features = FourierFeatures(2, features, scale, gen)
        layers, cin = [], 2 * features
        for _ in range(depth):
            layers += [nn.Linear(cin, width), AdaptiveTanh()]
            cin = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)
        self.apply(self._init)

    @staticmethod
    def _init(m):
        if isinstance(m, nn.Linear):
            nn.init.xavier_normal_(m.weight.data)
            m.bias.data.zero_()

    def forward(self, xt):
        return self.head(self.body(self.features(xt / self.span)))
