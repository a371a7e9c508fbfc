"""Broken: a learning rate at which the loss overflows within some steps."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
x = torch.randn(256, 20)
first_bad = None
for step in range(1, 61):
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
    loss.backward()
    if first_bad is None and not all(p.grad.isfinite().all() for p in model.parameters()):
        first_bad = step
    optimizer.step()
print("first bad step", first_bad)
