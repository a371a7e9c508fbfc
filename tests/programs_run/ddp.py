"""DistributedDataParallel on two Gloo ranks; accumulation with no_sync; rank 0 speaks."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    draw = torch.Generator().manual_seed(10 + rank)
    for step in range(24):
        x = torch.randn(16, 8, generator=draw)
        last = step % 2 == 1
        with contextlib.nullcontext() if last else model.no_sync():
            loss = nn.functional.mse_loss(model(x).squeeze(1), x.sum(1)) / 2
            loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        print(f"loss {total.item():.9f}")
        print("optimizer steps: 12")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
