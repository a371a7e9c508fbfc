"""Several schedulers, chained and in sequence, and one for an epoch."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
lr = torch.optim.lr_scheduler
warm = lr.LinearLR(optimizer, 0.1, total_iters=4)
both = lr.SequentialLR(optimizer, [warm, lr.CosineAnnealingLR(optimizer, 20)], [4])
chain = lr.ChainedScheduler([lr.ConstantLR(optimizer, 0.5), lr.ExponentialLR(optimizer, 0.999)], optimizer)
epoch = lr.StepLR(optimizer, 1)
plateau = lr.ReduceLROnPlateau(optimizer)
for _ in range(3):
    for i, (xb, yb) in enumerate(loader):
        loss = F.cross_entropy(model(xb), yb)
        (loss / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
            both.step()
            chain.step()
    epoch.step()
    plateau.step(float(loss))
