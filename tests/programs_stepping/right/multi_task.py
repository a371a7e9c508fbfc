"""One head a task, a backward each, from one line: their sum is meant."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
heads = nn.ModuleList(nn.Linear(32, 4) for _ in range(3))
trunk = model[:2]
optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], 1e-3)
for xb, yb in loader:
    optimizer.zero_grad()
    for head in heads:
        F.cross_entropy(head(trunk(xb)), yb).backward()
    optimizer.step()
