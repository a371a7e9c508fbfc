"""Two players, two optimizers, the critic's two losses one after another."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
critic = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
other = torch.optim.Adam(critic.parameters(), 1e-3)
moves = [torch.optim.lr_scheduler.ExponentialLR(one, 0.99) for one in (optimizer, other)]
for xb, _ in loader:
    other.zero_grad()
    F.softplus(-critic(xb[:, :4])).mean().backward()
    F.softplus(critic(model(xb).detach())).mean().backward()
    other.step()
    optimizer.zero_grad()
    F.softplus(-critic(model(xb))).mean().backward()
    optimizer.step()
    for move in moves:
        move.step()
