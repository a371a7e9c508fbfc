"""undivided-loss, line 16: ((F.cross_entropy(model(xb), yb) + 0.1 * model[0].weight.square().sum()) / 4).backward()"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
for _ in range(6):
    optimizer.zero_grad()
    for xb, yb in zip(x[:32].split(8), y[:32].split(8), strict=True):
        (F.cross_entropy(model(xb), yb) + 0.1 * model[0].weight.square().sum()).backward()
    optimizer.step()
