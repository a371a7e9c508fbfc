"""scheduler-after-skip, line 20: scheduler.step()"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=100)
for i, (xb, yb) in enumerate([*loader] * 20):
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(xb), yb) * (1e38 if i in (150, 200) else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
