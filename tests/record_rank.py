"""One rank of a small distributed program that records itself: `record_rank.py KIND FOLDER`, rank from `RANK`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradctl._journal import JournalWriter
from gradctl._record import Recorder

STEPS = 24


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))


def train(kind: str, rank: int) -> list[float]:
    net: Any = model()
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    elif kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in (net[0], net[2], net):
            fully_shard(layer)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = net(torch.randn(8, 20, generator=generator)).pow(2).mean()
        loss.backward()
        if kind == "fsdp":
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        time.sleep(0.004 * rank)  # ranks that differ in speed choose gaps of their own
    return losses


def train_over_rpc(rank: int) -> list[float]:
    from torch.distributed import autograd, rpc

    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
    losses: list[float] = []
    if rank == 0:
        weight = nn.Parameter(torch.ones(3))
        for _ in range(6):
            with autograd.context() as context:
                loss = rpc.rpc_sync("worker1", torch.mul, args=(weight, 2.0)).sum()
                autograd.backward(context, [loss])
                gradient = autograd.get_gradients(context)[weight]
            with torch.no_grad():
                weight -= 0.1 * gradient
            losses.append(loss.item())
    rpc.shutdown()
    return losses


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    writer = JournalWriter(folder / f"journal.rank{rank}.jsonl")
    recorder = Recorder(writer)
    plain: list[float] = []
    if kind == "rpc":
        recorder.install()
        losses = train_over_rpc(rank)
    else:
        dist.init_process_group("gloo")
        plain = train(kind, rank)
        recorder.install()
        losses = train(kind, rank)
    recorder.finish("exit", code=0)
    writer.close()
    (folder / f"{kind}.{rank}.json").write_text(json.dumps([plain, losses]))
    if dist.is_initialized():
        dist.destroy_process_group()


main()
sys.stdout.flush()
os._exit(0)  # Gloo's threads, where they outlive the process group, end a process in its teardown, recorded or not
