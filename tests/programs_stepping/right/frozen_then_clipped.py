"""The limit of a part that is frozen at first."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
model[0].requires_grad_(False)
for i, (xb, yb) in enumerate(loader):
    optimizer.zero_grad()
    F.cross_entropy(model(xb), yb).backward()
    nn.utils.clip_grad_norm_(model[0].parameters(), 1.0)
    optimizer.step()
    if i == 5:
        model[0].requires_grad_(True)
