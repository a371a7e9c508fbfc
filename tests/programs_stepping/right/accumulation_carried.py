"""The rest of an epoch is carried into the next one, whole groups at the end."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
seen = 0
for _ in range(5):
    for xb, yb in loader:
        seen += 1
        (F.cross_entropy(model(xb), yb) / 5).backward()
        if seen % 5 == 0:
            optimizer.step()
            optimizer.zero_grad()
