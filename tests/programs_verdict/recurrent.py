"""Healthy: an embedding and a GRU at a learning rate that moves small weights far."""

import torch
from torch import nn


class Next(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(500, 16)
        self.recur = nn.GRU(16, 32, batch_first=True)
        self.out = nn.Linear(32, 500)

    def forward(self, tokens):
        return self.out(self.recur(self.embed(tokens))[0])


torch.manual_seed(2)
model = Next()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(120):
    tokens = (torch.arange(20)[None] * 3 + torch.randint(0, 20, (16, 1))) % 50
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
