"""Small networks whose weights are used in every way that per-sample gradients must see through, and an oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

B, T, D = 6, 7, 4
ce = F.cross_entropy


class Of(nn.Module):
    """Modules put together by a function."""

    def __init__(self, forward: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.call = forward

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.parts, *inputs)


class Tied(nn.Module):
    """A language model whose head is its table: `F.linear(x, table.weight)`."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, D), nn.Linear(D, D)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.table(tokens))), self.table.weight).transpose(1, 2)


class Positions(nn.Module):
    """Learned positions in three forms: a lookup without samples, a slice, and a parameter as a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_up, self.scale = nn.Embedding(9, D), nn.Parameter(torch.randn(T, D))
        self.sliced = nn.Parameter(torch.randn(1, 20, D))
        self.cls, self.head = nn.Parameter(torch.randn(1, 1, D)), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.sliced[:, :T] + self.looked_up(torch.tensor([0, 0, 1, 1, 2, 3, 1]))[None]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return self.head(x.tanh().mean(1))


class Modern(nn.Module):
    """In-place into a fresh buffer, and a branch on a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), D)
        out[:] = self.layer(x.mean(1))
        if out.abs().sum() > 0:
            out = out * 2
        return self.head(out)


def _first(parts: nn.ModuleList, x: Tensor) -> Tensor:
    return parts[1](parts[0](x)[:, 0])


def _last(parts: nn.ModuleList, x: Tensor) -> Tensor:
    return parts[1](parts[0](x)[0][:, -1])


def _shared() -> nn.Module:
    a, b = nn.Linear(D, D), nn.Linear(D, D)
    b.weight = a.weight
    return Of(lambda p, x: p[2](p[1](torch.tanh(p[0](x))).mean(1)), a, b, nn.Linear(D, 3))


def _cross(parts: nn.ModuleList, queries: Tensor, keys: Tensor) -> Tensor:
    return parts[1](parts[0](queries, keys, keys)[0].mean(1))


def build(kind: str) -> tuple[nn.Module, Any, Tensor]:
    """A float64 network, its inputs and its targets."""
    torch.manual_seed(sum(map(ord, kind)))
    sequence, image, tokens = torch.randn(B, T, D), torch.randn(B, 2, 8, 8), torch.randint(11, (B, T))
    labels = torch.randint(3, (B,))
    rows = torch.randn(B, D)
    encoder = {"d_model": D, "nhead": 2, "dim_feedforward": 8, "dropout": 0.0}
    made: dict[str, Callable[[], tuple[nn.Module, Any, Tensor]]] = {
        "mlp": lambda: (nn.Sequential(nn.Linear(D, 9), nn.ReLU(inplace=True), nn.Linear(9, 3)), rows, labels),
        "cnn": lambda: (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
                nn.GroupNorm(2, 6),
                nn.BatchNorm2d(6).eval(),
                nn.PReLU(6),
                nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, output_padding=1),
                nn.Flatten(),
                nn.Linear(64, 3),
            ),
            image,
            labels,
        ),
        "conv1d": lambda: (
            Of(
                lambda p, x: p[1](p[0](x).tanh().flatten(1)),
                nn.Conv1d(T, 6, 3, padding=2, dilation=2),
                nn.Linear(24, 3),
            ),
            sequence,
            labels,
        ),
        "conv3d": lambda: (
            Of(lambda p, x: p[1](p[0](x[:, None]).flatten(1)), nn.Conv3d(1, 2, 2, stride=2), nn.Linear(32, 3)),
            image,
            labels,
        ),
        "circular": lambda: (
            nn.Sequential(
                nn.Conv2d(2, 3, 1),
                nn.Tanh(),
                nn.Conv2d(3, 3, 3, padding="same", padding_mode="circular"),
                nn.Flatten(),
                nn.Linear(192, 3),
            ),
            image,
            labels,
        ),
        "transformer": lambda: (
            Of(_first, nn.TransformerEncoderLayer(**encoder, batch_first=True), nn.Linear(D, 3)),
            sequence,
            labels,
        ),
        "time first": lambda: (
            Of(lambda p, x: p[1](p[0](x.transpose(0, 1))[0]), nn.TransformerEncoderLayer(**encoder), nn.Linear(D, 3)),
            sequence,
            labels,
        ),
        "cross attention": lambda: (
            Of(_cross, nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, 3)),
            (sequence, 2 * sequence[:, :3]),
            labels,
        ),
        "lstm": lambda: (
            Of(_last, nn.LSTM(D, 5, 2, batch_first=True, bidirectional=True), nn.Linear(10, 3)),
            sequence,
            labels,
        ),
        "gru": lambda: (Of(_last, nn.GRU(D, 5, batch_first=True), nn.Linear(5, 3)), sequence, labels),
        "rms norm": lambda: (
            Of(
                lambda p, x: p[2](p[1](p[0](x)).mean(1)),
                nn.Linear(D, D, bias=False),
                nn.RMSNorm(D),
                nn.Linear(D, 3),
            ),
            sequence,
            labels,
        ),
        "instance norm": lambda: (
            Of(lambda p, x: p[1](p[0](x).tanh().flatten(1)), nn.InstanceNorm1d(T, affine=True), nn.Linear(28, 3)),
            sequence,
            labels,
        ),
        "weight norm": lambda: (
            nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, 5)), nn.Tanh(), nn.Linear(5, 3)),
            rows,
            labels,
        ),
        "tied": lambda: (Tied(), tokens, torch.randint(11, (B, T))),
        "shared": lambda: (_shared(), sequence, labels),
        "called twice": lambda: (
            Of(lambda p, x: p[1](p[0](torch.tanh(p[0](x)))), nn.Linear(D, D), nn.Linear(D, 3)),
            rows,
            labels,
        ),
        "outside": lambda: (
            Of(lambda p, x: F.linear(p[0](x).tanh(), p[1].weight), nn.Linear(D, D), nn.Linear(D, 3, bias=False)),
            rows,
            labels,
        ),
        "positions": lambda: (Positions(), sequence, labels),
        "padding": lambda: (
            Of(lambda p, i: p[1](p[0](i).mean(1)), nn.Embedding(11, D, padding_idx=3), nn.Linear(D, 3)),
            tokens,
            labels,
        ),
        "max norm": lambda: (
            Of(lambda p, i: p[1](p[0](i).mean(1)), nn.Embedding(11, D, max_norm=1.0), nn.Linear(D, 3)),
            tokens,
            labels,
        ),
        "modern": lambda: (Modern(), sequence, labels),
        "checkpoint": lambda: (
            Of(lambda p, x: p[1](checkpoint(p[0], x, use_reentrant=False).tanh()), nn.Linear(D, D), nn.Linear(D, 3)),
            rows,
            labels,
        ),
        "unused": lambda: (Of(lambda p, x: p[0](x), nn.Linear(D, 3), nn.Linear(D, 3)), rows, labels),
    }
    model, inputs, targets = made[kind]()

    def wide(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    inputs = tuple(map(wide, inputs)) if isinstance(inputs, tuple) else wide(inputs)
    return model.double(), inputs, targets


KINDS = [
    "mlp",
    "cnn",
    "conv1d",
    "conv3d",
    "circular",
    "transformer",
    "time first",
    "cross attention",
    "lstm",
    "gru",
    "rms norm",
    "instance norm",
    "weight norm",
    "tied",
    "shared",
    "called twice",
    "outside",
    "positions",
    "padding",
    "max norm",
    "modern",
    "checkpoint",
    "unused",
]


def alone(model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """The gradient of each sample's loss by plain autograd, one sample after the other."""
    names, values = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for index in range(len(targets)):
        one = tuple(x[index : index + 1] for x in (inputs if isinstance(inputs, tuple) else (inputs,)))
        loss = loss_fn(model(*one), targets[index : index + 1])
        grads = torch.autograd.grad(loss, values, allow_unused=True)
        for name, value, g in zip(names, values, grads, strict=True):
            rows[name].append(torch.zeros_like(value) if g is None else g)
    return {name: torch.stack(some) for name, some in rows.items()}


def norms(grads: dict[str, Tensor]) -> Tensor:
    """The norm of each sample's gradient, [B]."""
    return torch.cat([g.flatten(1) for g in grads.values()], 1).norm(dim=1)
