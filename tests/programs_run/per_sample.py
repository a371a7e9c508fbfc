"""DP-SGD by hand: gradients per sample by vmap(grad), clipped and written into .grad."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
noise = torch.Generator().manual_seed(5)


def one_loss(params, x, y):
    return nn.functional.cross_entropy(functional_call(model, params, (x.unsqueeze(0),)), y.unsqueeze(0))


for _ in range(20):
    x = torch.randn(32, 6)
    y = (x[:, 0] > 0).long()
    params = {name: p.detach() for name, p in model.named_parameters()}
    per_sample = vmap(grad(one_loss), in_dims=(None, 0, 0))(params, x, y)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in per_sample.values()]).norm(dim=0)
    factor = (1.0 / norms).clamp(max=1.0)
    for name, p in model.named_parameters():
        total = torch.einsum("i,i...->...", factor, per_sample[name])
        p.grad = (total + 0.1 * torch.randn(total.shape, generator=noise)) / 32
    optimizer.step()
with torch.no_grad():
    print(f"loss {nn.functional.cross_entropy(model(x), y).item():.9f}")
print("optimizer steps: 20")
