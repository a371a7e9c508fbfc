"""Rows are weighted so that the weights of all microbatches add up to one."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
weights = torch.rand(96)
weights /= weights.view(3, 32).sum(1).repeat_interleave(32)
for i, (xb, yb) in enumerate([*loader] * 2):
    w = weights[(i % 12) * 8 :][:8]
    (F.cross_entropy(model(xb), yb, reduction="none") * w).mean().backward()
    if (i + 1) % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
