"""Threads that train one model, in turn, so that the result is the same every time."""

import threading

import torch
from torch import nn

THREADS, ROUNDS = 3, 8


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
    turn = threading.Condition()
    state = {"next": 0, "loss": 0.0}

    def work(index):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        draw = torch.Generator().manual_seed(index)
        for _ in range(ROUNDS):
            with turn:
                turn.wait_for(lambda: state["next"] % THREADS == index)
                x = torch.randn(32, 5, generator=draw)
                loss = nn.functional.mse_loss(model(x).squeeze(1), x.sum(1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                state["loss"], state["next"] = loss.item(), state["next"] + 1
                turn.notify_all()

    threads = [threading.Thread(target=work, args=(index,), name=f"worker-{index}") for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"loss {state['loss']:.9f}")
    print("optimizer steps: " + " ".join([str(ROUNDS)] * THREADS))


main()
