"""Several ranks, and torch.compile: what must be known of them so that recording neither waits nor is compiled."""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any

import torch

from gradctl import _taps
from gradctl import _torch_private as private
from gradctl._journal import JournalWriter
from gradctl._record._rows import short

_FIRST_ASKED = 12
"""DistributedDataParallel takes its times at iterations 10, 20 and every 100."""


def world_size() -> int:
    """Return the number of ranks, from the process group if there is one, else from the launcher."""
    distributed: Any = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


class DataParallelTimes:
    """Remembers, weakly, each DistributedDataParallel and writes the times that torch itself has measured.

    Args:
        journal: where the events go.
    """

    def __init__(self, journal: JournalWriter) -> None:
        self._journal = journal
        self._models: list[weakref.ref[Any]] = []
        self.ask_at = _FIRST_ASKED

    def wrap(self, inner: Any) -> Any:
        """The wrap of `DistributedDataParallel.__init__`."""

        def created(model: Any, *args: Any, **kwargs: Any) -> None:
            inner(model, *args, **kwargs)
            self._models.append(weakref.ref(model))

        return created

    def is_due(self, after: int) -> bool:
        """Whether there is a model to ask once `ask_at` steps are done, and `after` steps are fewer."""
        return bool(self._models) and after < self.ask_at

    def ask(self, step: int, *, last: bool = False) -> None:
        """Write the times if they are due after `step` steps; they are local to this rank, nothing is communicated."""
        if not self._models or (step < self.ask_at and not last):
            return
        self.ask_at = max(2 * step, _FIRST_ASKED)
        for reference in self._models:
            model = reference()
            if model is None or not hasattr(model, "_get_ddp_logging_data"):
                continue
            data = model._get_ddp_logging_data()
            fields = {
                f"{name}_ms": short(data[key] / 1e6)
                for name, key in (
                    ("forward", "avg_forward_compute_time"),
                    ("backward", "avg_backward_compute_time"),
                    ("communication", "avg_backward_comm_time"),
                    ("overlap", "avg_backward_compute_comm_overlap_time"),
                )
                if isinstance(data.get(key), int | float)
            }
            self._journal.event(
                "ddp", n=step, **fields, buckets=str(data.get("bucket_sizes", "")), world_size=data.get("world_size")
            )


_NEVER_TRACED = ("_explain", "_journal", "_lineage", "_names", "_off", "_record", "_run", "_saved", "_taps")


class CompilerSkip:
    """Keeps torch.compile from tracing our hooks: a compiled step breaks there and runs them as they are.

    Traced, the numbers that they count would become constants to guard on, and each step would compile anew.
    """

    def __init__(self) -> None:
        self._told = False

    def install(self) -> _taps.Handle:
        """Tell the compiler now if it is there, else when `torch.compile` is first called."""
        if "torch._dynamo" in sys.modules:
            self.tell()
        return _taps.compile.subscribe(self._wrap, order="measure")

    def tell(self) -> None:
        """Name the packages of our hooks to the compiler as ones to skip; what takes part in a forward is traced."""
        if not self._told:
            self._told = True
            skip = private.find("dynamo_skip")
            if skip is not None:
                for package in _NEVER_TRACED:
                    skip(f"gradctl.{package}")

    def _wrap(self, inner: Any) -> Any:
        def compile(*args: Any, **kwargs: Any) -> Any:
            self.tell()
            return inner(*args, **kwargs)

        return compile
