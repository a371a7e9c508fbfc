"""Healthy: a critic and a generator that play; the critic's last bias has a gradient of exactly zero by design."""

import torch
from torch import nn

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
of_generator = torch.optim.RMSprop(generator.parameters(), lr=5e-5)
of_critic = torch.optim.RMSprop(critic.parameters(), lr=5e-5)
for _ in range(120):
    for _ in range(3):
        real = torch.randn(64, 2) + 3
        of_critic.zero_grad()
        (critic(generator(torch.randn(64, 8)).detach()).mean() - critic(real).mean()).backward()
        of_critic.step()
        with torch.no_grad():
            for weight in critic.parameters():
                weight.clamp_(-0.01, 0.01)
    of_generator.zero_grad()
    (-critic(generator(torch.randn(64, 8))).mean()).backward()
    of_generator.step()
