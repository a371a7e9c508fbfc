"""Sparse gradients for an embedding, a second optimizer for the dense part."""

import torch
from torch import nn

torch.manual_seed(0)
table = nn.EmbeddingBag(200, 8, sparse=True)
head = nn.Linear(8, 2)
optimizers = [torch.optim.SparseAdam(table.parameters(), lr=1e-2), torch.optim.Adam(head.parameters(), lr=1e-2)]
for _ in range(25):
    words = torch.randint(0, 200, (32, 6))
    loss = nn.functional.cross_entropy(head(table(words)), words[:, 0] % 2)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
print(f"loss {loss.item():.9f}")
print("optimizer steps: 25 25")
