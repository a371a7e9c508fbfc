"""Broken: a bias that keeps every ReLU of one layer shut."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
with torch.no_grad():
    model[2].bias.fill_(-40.0)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
x = torch.randn(256, 20)
for _ in range(120):
    optimizer.zero_grad()
    (model(x) - x.sum(1, keepdim=True)).pow(2).mean().backward()
    optimizer.step()
