"""Sums over microbatches, divided by all tokens that count."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
for i in range(0, 12, 4):
    batches = [*loader][i : i + 4]
    total = sum(int((yb != 3).sum()) for _, yb in batches)
    for xb, yb in batches:
        loss = F.cross_entropy(model(xb), yb, ignore_index=3, reduction="sum") / total
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
