"""MAML on sine waves through torch.func: grad and vmap inside, one outer optimizer."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)


def task_loss(params, x, y):
    return nn.functional.mse_loss(functional_call(net, params, (x,)), y)


def adapted_loss(params, x_support, y_support, x_query, y_query):
    gradients = grad(task_loss)(params, x_support, y_support)
    adapted = {name: value - 0.05 * gradients[name] for name, value in params.items()}
    return task_loss(adapted, x_query, y_query)


for _ in range(25):
    amplitude, phase = torch.rand(8, 1, 1) * 4 + 0.5, torch.rand(8, 1, 1) * 3
    x_support, x_query = torch.rand(8, 10, 1) * 10 - 5, torch.rand(8, 10, 1) * 10 - 5
    y_support, y_query = amplitude * (x_support + phase).sin(), amplitude * (x_query + phase).sin()
    params = dict(net.named_parameters())
    losses = vmap(adapted_loss, in_dims=(None, 0, 0, 0, 0))(params, x_support, y_support, x_query, y_query)
    loss = losses.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.9f}")
print("optimizer steps: 25")
