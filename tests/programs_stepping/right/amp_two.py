"""One scaler, two optimizers, one loss that reaches both."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
critic = nn.Linear(4, 1)
other = torch.optim.Adam(critic.parameters(), 1e-3)
scaler = torch.amp.GradScaler("cpu")
for xb, yb in loader:
    for one in (optimizer, other):
        one.zero_grad()
    out = model(xb)
    scaler.scale(F.cross_entropy(out, yb)).backward(retain_graph=True)
    scaler.scale(critic(out).square().mean()).backward()
    for one in (optimizer, other):
        scaler.unscale_(one)
        nn.utils.clip_grad_norm_(one.param_groups[0]["params"], 1.0)
        scaler.step(one)
    scaler.update()
