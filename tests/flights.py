"""Runs a piece of training under the recorder, in this process, and reads the journal that it left."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gradctl import _journal
from gradctl._record import Recorder


class Flight:
    """A recorder and, once it has finished, its journal."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.writer = _journal.JournalWriter(path)
        self.recorder = Recorder(self.writer, **options)
        self.read: _journal.Journal | None = None

    @property
    def journal(self) -> _journal.Journal:
        """What the run left; only after it has ended."""
        assert self.read is not None
        return self.read


@contextlib.contextmanager
def recorded(folder: Path, **options: Any) -> Iterator[Flight]:
    """Record what happens inside, at whatever cost unless a budget is given; the journal can be read afterwards."""
    number = len(list(folder.glob("*.jsonl")))
    flight = Flight(folder / f"journal.rank{number}.jsonl", **{"budget": 1e9, **options})
    flight.recorder.install()
    try:
        yield flight
    finally:
        flight.recorder.finish("exit", code=0)
        flight.writer.close()
        if flight.path.exists():
            flight.read = _journal.read(flight.path)


def plain_and_recorded(folder: Path, train: Callable[[], Any], **options: Any) -> tuple[Any, Any, _journal.Journal]:
    """Run `train` twice from the same seed, without and with the recorder."""
    torch.manual_seed(0)
    plain = train()
    torch.manual_seed(0)
    with recorded(folder, **options) as flight:
        watched = train()
    return plain, watched, flight.journal


def close(code: float | None, exact: float) -> bool:
    """Whether a norm that was read from a journal is `exact` within its resolution of 1.2 %."""
    if code is None or math.isnan(code):
        return False
    return code == exact if exact == 0.0 else abs(code / exact - 1.0) < 0.0117
