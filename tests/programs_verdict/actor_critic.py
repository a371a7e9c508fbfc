"""Healthy: a policy gradient with a value baseline; its loss is noise."""

import torch
from torch import nn

torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
value = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=3e-4)
for _ in range(200):
    state = torch.randn(64, 4)
    choice = torch.distributions.Categorical(logits=policy(state))
    action = choice.sample()
    reward = (action == (state[:, 0] > 0)).float() + torch.randn(64)
    advantage = reward - value(state).squeeze()
    loss = -(choice.log_prob(action) * advantage.detach()).mean() + 0.5 * advantage.pow(2).mean()
    optimizer.zero_grad()
    (loss - 0.01 * choice.entropy().mean()).backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
    optimizer.step()
