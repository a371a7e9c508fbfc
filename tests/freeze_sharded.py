"""One rank of a training with `fully_shard`, in which parts are frozen; prints "all held" at its end."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gradctl
from gradctl import FreezeRefused, _taps


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def shard(model: nn.Sequential) -> None:
    for part in (model[0], model[2], model):
        fully_shard(part)


def whole(model: nn.Module) -> list[Tensor]:
    return [parameter.full_tensor().detach().clone() for parameter in model.parameters()]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


def flags_are_followed(order: str) -> None:
    model = net()
    handles = [gradctl.freeze(model, "0", "1")] if order != "after" else []
    shard(model)
    if order != "before":
        handles.append(gradctl.freeze(model, "0", "1"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = whole(model)
    model.train()
    train(model, optimizer)
    moved = [not torch.equal(a, b) for a, b in zip(before, whole(model), strict=True)]
    assert moved == [False, False, False, False, True, True], (order, moved)
    assert not model[1].training
    for handle in handles:
        handle.remove()
    assert all(parameter.requires_grad for parameter in model.parameters()), order
    assert model[1].training
    train(model, optimizer)
    moved = [not torch.equal(a, b) for a, b in zip(before, whole(model), strict=True)]
    assert all(moved), (order, moved)
    assert _taps.installed() == []


def rows_are_refused() -> None:
    model = net()
    rows = gradctl.freeze(model, rows={"0.weight": 0})
    shard(model)
    with pytest.raises(FreezeRefused, match=r"rows of 0\.weight are frozen no longer"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rows.remove()
    with pytest.raises(FreezeRefused, match=r"rows of 0\.weight, which is a DTensor"):
        gradctl.freeze(model, rows={"0.weight": 0})


def main() -> None:
    torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
    for order in ("before", "after", "both"):
        flags_are_followed(order)
    rows_are_refused()
    torch.distributed.destroy_process_group()
    print("all held")


if __name__ == "__main__":
    main()
