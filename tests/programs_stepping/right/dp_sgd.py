"""The gradient of each row is clipped by itself, then they are added."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
for xb, yb in [*loader][:4]:
    total = [torch.zeros_like(param) for param in model.parameters()]
    for row, label in zip(xb.split(1), yb.split(1), strict=True):
        F.cross_entropy(model(row), label).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for sum_, param in zip(total, model.parameters(), strict=True):
            sum_ += param.grad
        model.zero_grad()
    for sum_, param in zip(total, model.parameters(), strict=True):
        param.grad = (sum_ + torch.randn_like(sum_)) / len(xb)
    optimizer.step()
    optimizer.zero_grad()
