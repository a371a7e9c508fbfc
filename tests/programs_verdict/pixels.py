"""Healthy: LBFGS moves an image through a fixed net."""

import torch
from torch import nn

torch.manual_seed(9)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval().requires_grad_(False)
image = torch.randn(1, 3, 24, 24, requires_grad=True)
target = net(torch.randn(1, 3, 24, 24))
optimizer = torch.optim.LBFGS([image], max_iter=4)


def closure():
    optimizer.zero_grad()
    loss = (net(image) - target).pow(2).mean()
    loss.backward()
    return loss


for _ in range(100):
    optimizer.step(closure)
