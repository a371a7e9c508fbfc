"""fp16-norm-overflow, line 17: gradctl.precision("fp16-scaled")"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
model.half()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
for xb, _ in loader:
    optimizer.zero_grad()
    (100 * model(100 * xb.half())).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
