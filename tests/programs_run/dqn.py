"""Q-learning with a target network that is copied now and then."""

import copy
import random

import torch
from torch import nn

torch.manual_seed(0)
random.seed(0)
policy_net = nn.Sequential(nn.Linear(7, 24), nn.ReLU(), nn.Linear(24, 2))
target_net = copy.deepcopy(policy_net)
optimizer = torch.optim.RMSprop(policy_net.parameters(), lr=2e-3)
memory, steps = [], 0
for _ in range(20):
    place = 3
    for _ in range(15):
        action = random.randrange(2)
        after = place + 2 * action - 1
        done = after in (0, 6)
        memory.append((place, action, 1.0 if after == 6 else 0.0, after, done))
        place = 3 if done else after
        if len(memory) < 32:
            continue
        batch = random.sample(memory, 16)
        states = nn.functional.one_hot(torch.tensor([b[0] for b in batch]), 7).float()
        nexts = nn.functional.one_hot(torch.tensor([b[3] for b in batch]), 7).float()
        with torch.no_grad():
            bound = target_net(nexts).max(1).values * torch.tensor([0.0 if b[4] else 0.9 for b in batch])
        value = policy_net(states).gather(1, torch.tensor([[b[1]] for b in batch])).squeeze(1)
        loss = nn.functional.smooth_l1_loss(value, bound + torch.tensor([b[2] for b in batch]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(policy_net.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 50 == 0:
            target_net.load_state_dict(policy_net.state_dict())
print(f"loss {loss.item():.9f}")
print(f"optimizer steps: {steps}")
