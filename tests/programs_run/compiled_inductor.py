"""Inductor: compiled kernels for forward and backward."""

import torch
from torch import nn


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    forward = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        x = torch.randn(64, 8)
        loss = nn.functional.cross_entropy(forward(x), x[:, :4].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.9f}")
    print(f"graphs {torch._dynamo.utils.counters['stats']['unique_graphs']}")
    print("optimizer steps: 10")


if __name__ == "__main__":
    main()
