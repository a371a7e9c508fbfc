"""Whether torch records a graph now, asked in plain torch: the oracle of the tests of `gradctl.off`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(*(shape or (3,)), requires_grad=True)


def records() -> bool:
    """Whether an operation on a leaf that requires a gradient makes a node, in this thread with gradients enabled."""
    with torch.enable_grad():
        return (leaf() * 2).sum().grad_fn is not None


def in_thread(call: Callable[[], Any]) -> Any:
    """Return what `call` returns in a new thread, or raise what it raises."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, name="worker-7")
    thread.start()
    thread.join()
    fine, value = outcome[0]
    if not fine:
        raise value
    return value


class Held(torch.autograd.Function):
    """A node whose backward says that it has started and waits to be let go: `Held.apply(x, started, go)`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, started: threading.Event, go: threading.Event) -> torch.Tensor:
        ctx.events = started, go
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        started, go = ctx.events
        started.set()
        assert go.wait(30)
        return grads[0], None, None
