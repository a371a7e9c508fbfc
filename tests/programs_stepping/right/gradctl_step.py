"""gradctl.Step: everything in one place, and a flush at the end of each epoch."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradctl

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
step = gradctl.Step(model, optimizer, accumulate=5, clip=1.0, scheduler=scheduler)
for _ in range(3):
    for _result in step.epoch(loader, lambda batch: F.cross_entropy(model(batch[0]), batch[1])):
        pass
