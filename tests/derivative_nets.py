"""Small networks and dense matrices that tests of derivatives hold results to; plain torch, nothing of ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

F64 = torch.float64


class Recurrent(nn.Module):
    """An LSTM and a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def build(kind: str, dtype: torch.dtype = F64) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a network and what computes its cross entropy on a batch."""
    torch.manual_seed(0)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        x = torch.randn(7, 5)
    elif kind == "cnn":
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3))
        x = torch.randn(7, 1, 8, 8)
    elif kind == "transformer":
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3))
        x = torch.randn(7, 4, 8)
    else:
        model = Recurrent()
        x = torch.randn(7, 5, 3)
    y = torch.randint(0, 3, (7,))
    model, x = model.to(dtype), x.to(dtype)
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def directions(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Return random values by the names of the trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(param.shape, generator=generator, dtype=F64).to(param.dtype)
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def flat(values: dict[str, Tensor]) -> Tensor:
    """Return values as one vector."""
    return torch.cat([value.detach().reshape(-1) for value in values.values()])


def gradient_differences(model: nn.Module, loss: Callable[[], Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the central difference of gradients along `v`, in float64: an HVP where no kink is near."""
    params = dict(model.named_parameters())
    step = 1e-6

    def at(sign: float) -> list[Tensor]:
        with torch.no_grad():
            for name, value in v.items():
                params[name] += sign * step * value
        found = torch.autograd.grad(loss(), [params[name] for name in v])
        with torch.no_grad():
            for name, value in v.items():
                params[name] -= sign * step * value
        return list(found)

    return {name: (up - down) / (2 * step) for name, up, down in zip(v, at(1.0), at(-1.0), strict=True)}


def dense_hessian(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Return the whole Hessian by one plain double backward a row; for losses without fused kernels."""
    params = [param for param in model.parameters() if param.requires_grad]
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), params, create_graph=True)])
    rows: list[Tensor] = []
    for element in gradient:
        found = torch.autograd.grad(element, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference, as a share of the largest wanted value."""
    assert found.keys() == wanted.keys()
    scale = max(float(value.detach().abs().max()) for value in wanted.values())
    return max(float((found[name] - wanted[name]).detach().abs().max()) for name in wanted) / scale
