"""The generator steps every third batch; its scheduler moves with every batch."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(96, 16), torch.randint(0, 4, (96,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(TensorDataset(x, y), batch_size=8)
critic = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
other = torch.optim.RMSprop(critic.parameters(), 1e-3)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
for i, (xb, _) in enumerate([*loader] * 3):
    other.zero_grad()
    (critic(model(xb)).mean() - critic(xb[:, :4]).mean()).backward()
    other.step()
    if i % 3 == 2:
        optimizer.zero_grad()
        (-critic(model(xb)).mean()).backward()
        optimizer.step()
    scheduler.step()
