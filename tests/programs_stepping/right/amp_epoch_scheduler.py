"""The last step of an epoch is skipped, and the scheduler of the epoch moves."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
for _ in range(4):
    for i, (xb, yb) in enumerate(loader):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(xb), yb) * (1e38 if i == 11 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    scheduler.step()
