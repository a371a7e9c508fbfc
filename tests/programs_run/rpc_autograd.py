"""Distributed autograd and DistributedOptimizer over RPC between two spawned processes."""

import os
import socket

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import DistributedOptimizer


class Half(nn.Module):
    def __init__(self, seed, inputs, outputs):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.layer(x).tanh()

    def refs(self):
        return [rpc.RRef(p) for p in self.parameters()]


def run(rank, port):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
    if rank == 0:
        near, far = Half(1, 6, 12), rpc.remote("worker1", Half, args=(2, 12, 1))
        optimizer = DistributedOptimizer(torch.optim.SGD, near.refs() + far.rpc_sync().refs(), lr=0.1)
        torch.manual_seed(0)
        for _ in range(10):
            x = torch.randn(32, 6)
            with dist_autograd.context() as context:
                loss = nn.functional.mse_loss(far.rpc_sync().forward(near(x)).squeeze(1), x.mean(1))
                dist_autograd.backward(context, [loss])
                optimizer.step(context)
        print(f"loss {loss.item():.9f}", flush=True)
        print("distributed steps: 10", flush=True)
    rpc.shutdown()


def main():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, args=(port,), nprocs=2)


if __name__ == "__main__":
    main()
