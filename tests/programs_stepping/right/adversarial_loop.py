"""Free adversarial training: several backwards to the input, one step each."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
for xb, yb in loader:
    delta = torch.zeros_like(xb)
    for _ in range(3):
        delta = delta.detach().requires_grad_()
        optimizer.zero_grad()
        F.cross_entropy(model(xb + delta), yb).backward()
        delta = delta + 0.01 * delta.grad.sign()
        optimizer.step()
