"""Activation checkpointing, both kinds, with dropout whose RNG must come out the same."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))
        self.runs = 0

    def body(self, x):
        self.runs += 1
        return x + self.inner(x)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


torch.manual_seed(0)
stem, head = nn.Linear(4, 16), nn.Linear(16, 2)
blocks = nn.ModuleList(Block(index % 2 == 1) for index in range(4))
model = nn.Sequential(stem, *blocks, head)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(15):
    x = torch.randn(32, 4)
    loss = nn.functional.mse_loss(model(x), x[:, :2] * x[:, 2:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.9f} forwards {[block.runs for block in blocks]}")
print("optimizer steps: 15")
