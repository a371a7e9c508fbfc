"""A compiled model, forward and backward through AOTAutograd."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))
compiled = torch.compile(model, backend="aot_eager")
optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
for _ in range(20):
    x = torch.randn(64, 8)
    loss = nn.functional.cross_entropy(compiled(x), x[:, :4].argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.9f}")
print(f"graphs {torch._dynamo.utils.counters['stats']['unique_graphs']}")
print("optimizer steps: 20")
