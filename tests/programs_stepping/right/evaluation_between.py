"""Gradients of the evaluation set are measured between steps, and zeroed."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
for _epoch in range(4):
    for i, (xb, yb) in enumerate(loader):
        (F.cross_entropy(model(xb), yb) / 4).backward()
        if (i + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
    for xb, yb in [*loader][:2]:
        F.cross_entropy(model(xb), yb).backward()
    sharp = sum(float(param.grad.norm()) for param in model.parameters())
    model.zero_grad()
