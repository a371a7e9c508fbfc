"""One rank of several small distributed trainings, each with and without regions; writes what differed to a file."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradctl._recompute import recompute

WIDTH = 64
Wrap = Callable[[Any], Any]
PROGRAMS: dict[str, Callable[[Wrap], list[Tensor]]] = {}


def program(build: Callable[[Wrap], list[Tensor]]) -> Callable[[Wrap], list[Tensor]]:
    PROGRAMS[build.__name__] = build
    return build


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm1d(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.2, self.training))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 8))


def recomputed(model: nn.Sequential, wrap: Wrap) -> nn.Sequential:
    for block in model[:2]:
        wrap(block)
    return model


def train(model: nn.Module, *, sync: Callable[[int], bool] | None = None) -> list[Tensor]:
    torch.manual_seed(1 + dist.get_rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses: list[Tensor] = []
    for _ in range(4):
        for micro in range(2 if sync is not None else 1):
            if sync is not None:
                model.set_requires_gradient_sync(sync(micro))
            loss = model(torch.randn(32, WIDTH)).float().square().mean()
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *map(whole, model.parameters()), *(b.clone() for b in model.buffers())]


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


@program
def regions_below_ddp(wrap: Wrap) -> list[Tensor]:
    return train(DistributedDataParallel(recomputed(net(), wrap)))


@program
def regions_below_ddp_with_a_static_graph(wrap: Wrap) -> list[Tensor]:
    return train(DistributedDataParallel(recomputed(net(), wrap), static_graph=True))


@program
def regions_below_ddp_with_unused_parameters(wrap: Wrap) -> list[Tensor]:
    model = recomputed(net(), wrap)
    model.register_parameter("idle", nn.Parameter(torch.zeros(3)))
    return train(DistributedDataParallel(model, find_unused_parameters=True))


@program
def ddp_inside_of_a_region(wrap: Wrap) -> list[Tensor]:
    model = DistributedDataParallel(net())
    wrap(model)
    return train(model)


def sharded(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for block in (*model[:2], model):
        fully_shard(block, **options)
    return model


@program
def regions_then_fully_shard(wrap: Wrap) -> list[Tensor]:
    return train(sharded(recomputed(net(), wrap)))


@program
def fully_shard_then_regions(wrap: Wrap) -> list[Tensor]:
    return train(recomputed(sharded(net()), wrap))


@program
def fully_shard_that_keeps_what_it_gathered(wrap: Wrap) -> list[Tensor]:
    return train(sharded(recomputed(net(), wrap), reshard_after_forward=False))


@program
def fully_shard_in_bfloat16(wrap: Wrap) -> list[Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = net()
    for block in model[:2]:
        block.norm = nn.LayerNorm(WIDTH)
    return train(sharded(recomputed(model, wrap), mp_policy=policy))


@program
def fully_shard_with_accumulation(wrap: Wrap) -> list[Tensor]:
    return train(sharded(recomputed(net(), wrap)), sync=lambda micro: micro == 1)


@program
def a_region_around_fully_shard(wrap: Wrap) -> list[Tensor]:
    model = sharded(net())
    wrap(model)
    return train(model)


def _with_collective(wrap: Wrap, talk: Callable[[Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(dist.get_rank())
    w, x = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8), torch.randn(32, WIDTH)
    region = wrap(lambda t: (talk((t @ w).tanh()) @ w).sin())
    found: list[Tensor] = []
    for _ in range(3):
        found += torch.autograd.grad(region(x).sum(), w)
    return found


@program
def a_reduction_in_place_inside(wrap: Wrap) -> list[Tensor]:
    def talk(y: Tensor) -> Tensor:
        total = y.detach() * 1
        dist.all_reduce(total)
        return y * total.exp()

    return _with_collective(wrap, talk)


@program
def a_reduction_that_is_waited_for_later(wrap: Wrap) -> list[Tensor]:
    def talk(y: Tensor) -> Tensor:
        total = y.detach() * 1
        work = dist.all_reduce(total, async_op=True)
        z = y.exp()
        work.wait()
        return z * total.sin()

    return _with_collective(wrap, talk)


@program
def a_gather_into_a_buffer_inside(wrap: Wrap) -> list[Tensor]:
    def talk(y: Tensor) -> Tensor:
        parts = y.new_empty(2 * y.shape[0], y.shape[1])
        dist.all_gather_into_tensor(parts, y.detach())
        return y * parts.view(2, *y.shape).mean(0)

    return _with_collective(wrap, talk)


@program
def functional_collectives_inside(wrap: Wrap) -> list[Tensor]:
    group = dist.group.WORLD
    return _with_collective(wrap, lambda y: collectives.all_gather_tensor_autograd(y, 0, group)[: y.shape[0]] * y)


def run(name: str) -> str:
    build = PROGRAMS[name]
    plain = build(lambda target: target)
    ours = build(recompute)
    if len(ours) != len(plain):
        return f"{len(ours)} tensors, {len(plain)} without regions"
    different = [i for i, (a, b) in enumerate(zip(ours, plain, strict=True)) if not torch.equal(a, b)]
    return f"tensors {different} of {len(plain)} differ" if different else "same"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, found = int(os.environ["RANK"]), dict[str, str]()
    for name in PROGRAMS:
        try:
            found[name] = run(name)
        except Exception:
            found[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
