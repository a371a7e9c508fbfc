"""Broken: what two layers make is detached, and a third is never used."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 64)
        self.second = nn.Linear(64, 64)
        self.head = nn.Linear(64, 1)
        self.unused = nn.Linear(64, 3)

    def forward(self, x):
        hidden = self.second(self.first(x).relu()).detach()
        return self.head(hidden.relu())


torch.manual_seed(0)
model = Net()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
x = torch.randn(256, 20)
for _ in range(60):
    optimizer.zero_grad()
    (model(x) - x.sum(1, keepdim=True)).pow(2).mean().backward()
    optimizer.step()
