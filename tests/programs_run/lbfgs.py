"""LBFGS with a closure: several backwards a step."""

import torch

torch.manual_seed(0)
x = torch.randn(64, 5)
y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0]) + 0.7 + 0.3 * torch.randn(64)
model = torch.nn.Linear(5, 1)
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
calls = 0


def closure():
    global calls
    calls += 1
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x).squeeze(1), y)
    loss.backward()
    return loss


for _ in range(12):
    loss = optimizer.step(closure)
print(f"loss {loss.item():.9f} closures {calls}")
print("optimizer steps: 12")
