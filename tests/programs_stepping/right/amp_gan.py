"""One scaler, two players, an update after each."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
critic = nn.Linear(4, 1)
other = torch.optim.SGD(critic.parameters(), 1e-3)
scaler = torch.amp.GradScaler("cpu", growth_interval=1)
for xb, _ in loader:
    other.zero_grad()
    scaler.scale(F.softplus(critic(model(xb).detach())).mean()).backward()
    scaler.step(other)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(F.softplus(-critic(model(xb))).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
