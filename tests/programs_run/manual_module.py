"""No optimizer, but a module: gradients by autograd.grad, momentum kept by hand."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
velocity = [torch.zeros_like(p) for p in model.parameters()]
x = torch.randn(128, 3)
y = x.prod(1, keepdim=True)
for _ in range(30):
    loss = torch.nn.functional.mse_loss(model(x), y)
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p, v in zip(model.parameters(), velocity, strict=True):
            v.mul_(0.9).add_(p.grad)
            p.sub_(0.02 * v)
print(f"loss {loss.item():.9f}")
print("backwards: 30")
