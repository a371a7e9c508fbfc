"""The critic's two losses come from one line, and are added."""

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
for xb, _ in loader:
    other.zero_grad()
    for data, label in ((xb[:, :4], 1.0), (model(xb).detach(), 0.0)):
        F.binary_cross_entropy_with_logits(critic(data), torch.full((8, 1), label)).backward()
    other.step()
    optimizer.zero_grad()
    F.softplus(-critic(model(xb))).mean().backward()
    optimizer.step()
