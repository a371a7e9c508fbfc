"""Broken: the head is replaced after the optimizer was made."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
model[2] = nn.Linear(64, 3)
x, label = torch.randn(256, 20), torch.randint(0, 3, (256,))
for _ in range(60):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), label).backward()
    optimizer.step()
