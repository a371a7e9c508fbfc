"""The routes by which a gradient can get past a switch, each a small program cut in two by a `yield`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch


class Evidence:
    """What got through: `G` a graph was recorded, `B` a gradient computation completed, `A` a `.grad` was filled or a
    weight moved by it, `AD` a functional derivative came out right, `zero` it came out silently as zeros."""

    def __init__(self) -> None:
        self.marks: set[str] = set()
        self.refusals: list[str] = []

    def graph(self, *tensors: Any) -> None:
        if any(tensor.grad_fn is not None for tensor in tensors):
            self.marks.add("G")

    def filled(self, *leaves: Any) -> None:
        if any(leaf.grad is not None for leaf in leaves):
            self.marks.add("A")

    def derivative(self, got: Any, right: Any) -> None:
        got, right = torch.as_tensor(got), torch.as_tensor(right)
        if torch.allclose(got, right.to(got.dtype)):
            self.marks.add("AD")
        elif not got.any():
            self.marks.add("zero")

    def train(self, loss: Any, *leaves: Any) -> None:
        """Look for a graph, then run backward and look for gradients."""
        self.graph(loss)
        loss.backward()
        self.marks.add("B")
        self.filled(*leaves)

    def attempt(self, work: Callable[[], object]) -> None:
        """Run `work`; what it raises is noted, as it is what a refusal looks like."""
        try:
            work()
        except BaseException as error:
            self.refusals.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def in_thread(self, work: Callable[[], object], start: Callable[..., Any] = threading.Thread) -> None:
        thread = start(target=lambda: self.attempt(work))
        thread.start()
        thread.join()


Body = Callable[[Evidence], Generator[None, None, None]]


@dataclass(frozen=True)
class Route:
    """One route.

    Args:
        name: as in the table of routes.
        body: generator function; the switch is thrown at its only `yield`.
        past_no_grad: whether it gets past `torch.no_grad()` in the main thread.
        slow: needs a compiler, a server or a fresh interpreter.
    """

    name: str
    body: Body
    past_no_grad: bool
    slow: bool


ROUTES: dict[str, Route] = {}


def route(*, past_no_grad: bool = True, slow: bool = False, name: str | None = None) -> Callable[[Body], Body]:
    """Register a route under its function's name, or under `name`."""

    def register(body: Body) -> Body:
        key = name or body.__name__
        assert key not in ROUTES
        ROUTES[key] = Route(key, body, past_no_grad, slow)
        return body

    return register


def leaf() -> torch.Tensor:
    return torch.ones(3, requires_grad=True)


def double(w: torch.Tensor) -> torch.Tensor:
    return (w * 2).sum()


def square(w: torch.Tensor) -> torch.Tensor:
    return (w * w).sum()
