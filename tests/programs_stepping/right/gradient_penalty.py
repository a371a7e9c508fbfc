"""WGAN-GP: a gradient inside of the loss."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
for xb, _ in loader:
    mixed = torch.rand(8, 16, requires_grad=True)
    slope = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)[0]
    penalty = (slope.norm(dim=1) - 1).square().mean()
    optimizer.zero_grad()
    (model(xb).mean() + 10 * penalty).backward()
    optimizer.step()
