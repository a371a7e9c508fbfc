"""Unscaled by the scaler, checked and stepped by hand."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
scaler = torch.amp.GradScaler("cpu")
for xb, yb in loader:
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(xb), yb)).backward()
    scaler.unscale_(optimizer)
    if all(bool(param.grad.isfinite().all()) for param in model.parameters()):
        optimizer.step()
    scaler.update()
