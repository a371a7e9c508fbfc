"""torch.func: an ensemble under vmap, gradients from grad(), a functional update and .grad for AdamW."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

MEMBERS = 4


def member() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 6)
    return x, torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] + 0.05 * torch.randn(count, 1)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    skeleton = member().to("meta")
    params, buffers = stack_module_state([member() for _ in range(MEMBERS)])

    def loss_of(weights, rest, x, y):
        return F.mse_loss(functional_call(skeleton, (weights, rest), (x,)), y)

    step_of = vmap(grad_and_value(loss_of), in_dims=(0, 0, 0, 0))

    weights = {name: p.detach() for name, p in params.items()}
    first = last = torch.zeros(())
    for step in range(15):
        x, y = data(MEMBERS * 16)
        grads, losses = step_of(weights, buffers, x.view(MEMBERS, 16, 6), y.view(MEMBERS, 16, 1))
        weights = {name: w - 0.1 * grads[name] for name, w in weights.items()}
        first, last = (losses.mean(), losses.mean()) if step == 0 else (first, losses.mean())
    print(f"functional SGD {first.item():.3f} -> {last.item():.3f}")

    optimizer = torch.optim.AdamW(params.values(), lr=2e-2)
    for step in range(15):
        x, y = data(MEMBERS * 16)
        constants = {name: p.detach() for name, p in params.items()}
        grads, losses = step_of(constants, buffers, x.view(MEMBERS, 16, 6), y.view(MEMBERS, 16, 1))
        for name, p in params.items():
            p.grad = grads[name]
        optimizer.step()
        optimizer.zero_grad()
        if step % 7 == 0:
            print(step, [round(v, 3) for v in losses.tolist()])

    x, _ = data(32)
    with torch.no_grad():
        out = vmap(lambda w, b: functional_call(skeleton, (w, b), (x,)))(params, buffers)
    print(f"disagreement {out.std(dim=0).mean().item():.3f}")


if __name__ == "__main__":
    main()
