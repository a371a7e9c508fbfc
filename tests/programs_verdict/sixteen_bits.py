"""Broken: bfloat16 weights at a learning rate whose updates round to nothing."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1)).bfloat16()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
x = torch.randn(256, 64).bfloat16()
for _ in range(120):
    optimizer.zero_grad()
    (model(x) - x.float().sum(1, keepdim=True).bfloat16()).pow(2).mean().backward()
    optimizer.step()
