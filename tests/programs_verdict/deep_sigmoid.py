"""Broken: thirty sigmoid layers, through which nothing comes back."""

import torch
from torch import nn

torch.manual_seed(0)
layers = [layer for _ in range(30) for layer in (nn.Linear(32, 32), nn.Sigmoid())]
model = nn.Sequential(*layers, nn.Linear(32, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(120):
    x = torch.randn(64, 32)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
    optimizer.step()
