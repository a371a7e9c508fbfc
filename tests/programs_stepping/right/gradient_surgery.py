"""The gradient of each task is read and removed; what is left of them is the step."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
params = [*model.parameters()]
for xb, yb in loader:
    grads = []
    for task in range(2):
        F.mse_loss(model(xb)[:, task], yb.float()).backward()
        grads.append([param.grad.clone() for param in params])
        for param in params:
            param.grad = None
    for param, one, two in zip(params, *grads, strict=True):
        param.grad = one + two
    optimizer.step()
    optimizer.zero_grad()
