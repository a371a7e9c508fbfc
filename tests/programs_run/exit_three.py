"""Trains a little, then leaves by sys.exit(3), with an atexit handler of its own."""

import atexit
import sys

import torch

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
atexit.register(lambda: print("goodbye"))
for _ in range(5):
    loss = model(torch.randn(8, 4)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.9f}")
print("optimizer steps: 5")
sys.exit(3)
