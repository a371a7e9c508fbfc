"""A closure that accumulates over microbatches, divided."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)


def closure():
    optimizer.zero_grad()
    total = 0.0
    for xb, yb in zip(x.split(24), y.split(24), strict=True):
        loss = F.cross_entropy(model(xb), yb) / 4
        loss.backward()
        total += float(loss)
    return total


for _ in range(4):
    optimizer.step(closure)
