"""Healthy: top-1 experts of which some rest, four microbatches a step."""

import torch
from torch import nn


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        weight = self.gate(x).softmax(1)
        chosen = weight.argmax(1)
        hidden = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            mine = chosen == k
            if mine.any():
                hidden[mine] = weight[mine, k : k + 1] * expert(x[mine])
        return self.out(hidden.relu())


torch.manual_seed(6)
model = Experts()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(120):
    optimizer.zero_grad()
    for _ in range(4):
        x = torch.randn(8, 16)
        label = (x[:, :2].sum(1) > 0).long() + 2 * (x[:, 3] > 0).long()
        (nn.functional.cross_entropy(model(x), label) / 4).backward()
    optimizer.step()
