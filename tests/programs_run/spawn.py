"""torch.multiprocessing: the parent only waits, two spawned children train."""

import torch
import torch.multiprocessing as mp


def train(rank, results):
    torch.manual_seed(rank)
    model = torch.nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        x = torch.randn(16, 6)
        loss = (model(x).squeeze(1) - x.sum(1)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    results[rank] = loss.item()


if __name__ == "__main__":
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(train, args=(results,), nprocs=2)
        print(" ".join(f"{results[rank]:.9f}" for rank in range(2)))
    print("optimizer steps of children: 10 10")
