"""A pipeline of two stages on two Gloo ranks, GPipe schedule, one optimizer a stage; the last rank speaks."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    halves = [
        nn.Sequential(nn.Linear(6, 16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)),
    ]
    model = halves[rank]
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(10):
        x = torch.randn(16, 6, generator=draw)
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            losses = []
            schedule.step(target=x.sum(1, keepdim=True), losses=losses)
        optimizer.step()
    if rank == 1:
        print(f"loss {sum(loss.item() for loss in losses):.9f}")
        print("optimizer steps: 10")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
