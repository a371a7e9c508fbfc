"""FGSM: a backward for the inputs, zeroed, then one for the weights."""

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
    attacked = xb.clone().requires_grad_()
    F.cross_entropy(model(attacked), yb).backward()
    model.zero_grad()
    optimizer.zero_grad()
    F.cross_entropy(model(xb + 0.1 * attacked.grad.sign()), yb).backward()
    optimizer.step()
