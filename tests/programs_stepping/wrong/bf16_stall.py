"""bf16-stall, line 18: gradctl.precision("bf16-master")"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
model.bfloat16()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
for xb, yb in [*loader] * 10:
    optimizer.zero_grad()
    F.cross_entropy(model(xb.bfloat16()), yb).backward()
    optimizer.step()
