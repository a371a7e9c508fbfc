"""undivided-loss, line 24: (loss / 4).backward()"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)


def get_batch():
    rows = torch.randint(0, len(x), (8,))
    return x[rows], y[rows]


for _ in range(6):
    for _micro_step in range(4):
        xb, yb = get_batch()
        loss = ((model(xb) - F.one_hot(yb, 4)) ** 2).mean()
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
