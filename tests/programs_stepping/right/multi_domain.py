"""One loader a domain, and the sum of their losses."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
loaders = [DataLoader(TensorDataset(x + k, y), batch_size=24) for k in range(3)]
for _ in range(2):
    for parts in zip(*loaders, strict=True):
        optimizer.zero_grad()
        for xb, yb in parts:
            F.cross_entropy(model(xb), yb).backward()
        optimizer.step()
