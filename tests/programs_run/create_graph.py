"""A gradient penalty: autograd.grad with create_graph inside the loss, and a double backward."""

import torch
from torch import nn

torch.manual_seed(0)
critic = nn.Sequential(nn.Linear(3, 24), nn.Softplus(), nn.Linear(24, 1))
optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.0, 0.9))
for _ in range(20):
    real, fake = torch.randn(32, 3) + 1, torch.randn(32, 3)
    mix = (real + torch.rand(32, 1) * (fake - real)).requires_grad_()
    slope = torch.autograd.grad(critic(mix).sum(), mix, create_graph=True)[0]
    penalty = (slope.norm(dim=1) - 1).pow(2).mean()
    loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.9f} penalty {penalty.item():.9f}")
print("optimizer steps: 20")
