"""DistributedDataParallel, one Gloo process on loopback, heads that take turns, no_sync accumulation."""

import contextlib
import os
import socket

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class MultiTask(nn.Module):
    """Every batch belongs to one task and uses that task's adapter and head only."""

    def __init__(self, tasks: int):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.adapters = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(tasks))
        self.heads = nn.ModuleList(nn.Linear(24, 2) for _ in range(tasks))
        for adapter in self.adapters:
            nn.init.zeros_(adapter.weight)

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        h = self.trunk(x)
        return self.heads[task](h + self.adapters[task](h))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(MultiTask(3), find_unused_parameters=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    truth = torch.randn(3, 8)
    losses: list[torch.Tensor] = []
    for step in range(18):
        optimizer.zero_grad()
        for part in range(2):
            task = step % 3
            x = torch.randn(16, 8)
            y = (x @ truth[task] > 0).long()
            with contextlib.nullcontext() if part == 1 else model.no_sync():
                loss = F.cross_entropy(model(x, task), y) / 2
                loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = loss.detach().clone()
        dist.all_reduce(value)
        losses.append(2 * value / dist.get_world_size())
        if dist.get_rank() == 0 and step % 6 == 5:
            print(step, [round(v.item(), 3) for v in losses[-3:]])
    model.eval()
    with torch.no_grad():
        x = torch.randn(64, 8)
        right = [(model(x, k).argmax(1) == (x @ truth[k] > 0)).float().mean().item() for k in range(3)]
    print([round(r, 3) for r in right])


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        train()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
