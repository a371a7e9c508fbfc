"""No optimizer: the update is written by hand, for bare tensors."""

import torch


def main():
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 100).unsqueeze(1)
    y = x**3 - x
    w1 = (torch.randn(1, 20) * 0.5).requires_grad_()
    b1 = torch.zeros(20, requires_grad=True)
    w2 = (torch.randn(20, 1) * 0.5).requires_grad_()
    b2 = torch.zeros(1, requires_grad=True)
    for _ in range(40):
        loss = (((x @ w1 + b1).tanh() @ w2 + b2 - y) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            for w in (w1, b1, w2, b2):
                w -= 0.05 * w.grad
                w.grad = None
    print(f"loss {loss.item():.9f}")
    print("backwards: 40")


main()
