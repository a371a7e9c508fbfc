"""Sharpness-aware: up the slope with a first backward, down with a second."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
for xb, yb in loader:
    optimizer.zero_grad()
    F.cross_entropy(model(xb), yb).backward()
    with torch.no_grad():
        moves = [0.01 * param.grad / (param.grad.norm() + 1e-8) for param in model.parameters()]
        torch._foreach_add_([*model.parameters()], moves)
    optimizer.zero_grad()
    F.cross_entropy(model(xb), yb).backward()
    with torch.no_grad():
        torch._foreach_sub_([*model.parameters()], moves)
    optimizer.step()
