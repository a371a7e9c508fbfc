"""undivided-loss, line 14: (F.mse_loss(model(xb), F.one_hot(yb, 4).float()) / 3).backward()"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
for i, (xb, yb) in enumerate([*loader] * 3):
    F.mse_loss(model(xb), F.one_hot(yb, 4).float()).backward()
    if (i + 1) % 3 != 0:
        continue
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
