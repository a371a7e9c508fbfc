"""MAML: an inner step a task, the outer losses added task by task."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)

for _ in range(4):
    optimizer.zero_grad()
    for xb, yb in [*loader][:3]:
        params = dict(model.named_parameters())
        inner = F.cross_entropy(functional_call(model, params, (xb,)), yb)
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        outer = F.cross_entropy(functional_call(model, fast, (xb,)), yb)
        outer.backward()
    optimizer.step()
