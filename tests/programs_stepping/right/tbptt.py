"""Truncated backpropagation: the losses of the parts of a sequence are added."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
cell, head = nn.GRU(16, 8), nn.Linear(8, 4)
optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], 1e-3)
for _ in range(4):
    state = torch.zeros(1, 2, 8)
    optimizer.zero_grad()
    for part in x.view(48, 2, 16).split(12):
        out, state = cell(part, state)
        F.mse_loss(head(out), part[..., :4]).backward()
        state = state.detach()
    optimizer.step()
