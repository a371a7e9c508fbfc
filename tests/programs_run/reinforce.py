"""REINFORCE on a small corridor: many forwards, one backward an episode."""

import torch
from torch import nn
from torch.distributions import Categorical


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(7, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, state):
        return Categorical(logits=self.head(self.body(state).relu()))


class Agent:
    def __init__(self):
        self.policy = Policy()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-2)

    def episode(self):
        place, log_probs, rewards = 3, [], []
        while 0 < place < 6 and len(rewards) < 30:
            state = nn.functional.one_hot(torch.tensor(place), 7).float()
            choice = self.policy(state)
            action = choice.sample()
            log_probs.append(choice.log_prob(action))
            place += 2 * int(action) - 1
            rewards.append(1.0 if place == 6 else -0.05)
        total, returns = 0.0, []
        for reward in reversed(rewards):
            total = reward + 0.95 * total
            returns.insert(0, total)
        loss = -(torch.stack(log_probs) * torch.tensor(returns)).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return sum(rewards)


torch.manual_seed(0)
agent = Agent()
scores = [agent.episode() for _ in range(60)]
print(f"first {sum(scores[:20]):.4f} last {sum(scores[-20:]):.4f}")
print("optimizer steps: 60")
