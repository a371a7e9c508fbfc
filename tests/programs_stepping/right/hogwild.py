"""Two threads, two models, each with its own order."""

import threading

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)


def train():
    own = nn.Linear(16, 4)
    step = torch.optim.SGD(own.parameters(), 0.1)
    for xb, yb in zip(x.split(8), y.split(8), strict=True):
        step.zero_grad()
        F.cross_entropy(own(xb), yb).backward()
        step.step()


threads = [threading.Thread(target=train) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
