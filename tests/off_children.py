"""What the children of `test_off_children.py` run: it must be importable in a process of its own."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils.data import Dataset


def outcome() -> tuple[bool, bool, str]:
    """Whether this thread and a new one record a graph, and what a backward raises."""
    answers: list[bool] = []

    def look() -> None:
        with torch.enable_grad():
            answers.append((torch.ones(3, requires_grad=True) * 2).grad_fn is not None)

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    try:
        torch.ones((), requires_grad=True).backward()
    except RuntimeError as error:
        return answers[0], answers[1], type(error).__name__
    return answers[0], answers[1], ""


def put_outcome(queue: Any, *_: Any) -> None:
    queue.put(outcome())


def outcome_of(_: int) -> tuple[bool, bool, str]:
    return outcome()


class Outcomes(Dataset[torch.Tensor]):
    """A data set whose only item says whether the process that loads it records."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        here, thread, _ = outcome()
        return torch.tensor([here, thread])
