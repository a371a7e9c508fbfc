"""unscale-between-microbatches, line 20: scaler.update(scale)"""

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
for i, (xb, yb) in enumerate([*loader] * 2):
    scaler.scale(F.cross_entropy(model(xb), yb) / 4).backward()
    scale = 2.0 ** (10 + i % 3)
    if (i + 1) % 4 == 0:
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update(scale)
