"""Healthy: a hinge loss that is solved; from then on gradients are zero because nothing is left to learn."""

import torch

torch.manual_seed(3)
x = torch.randn(200, 8)
side = torch.sign(x @ torch.randn(8))
x = x[(x @ torch.randn(8)).abs() > 0] + 0.5 * side[:, None] * torch.ones(8)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(300):
    optimizer.zero_grad()
    (1 - side * model(x).squeeze()).clamp(min=0).mean().backward()
    optimizer.step()
