"""One operation that shows whether a graph is recorded now, unseen by the modes of the thread that runs it."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from gradctl import _torch_private as private


class EngineFailed(Exception):
    """Why an engine cannot be used here, or has failed its self-test."""


class Probe:
    """A leaf, and the state of dispatch that a new thread has: no mode, no transform, no tracer."""

    def __init__(self) -> None:
        self._guard = private.get("dispatch_guard")
        self._leaf = torch.ones((), device="cpu", requires_grad=True)
        self._keys: tuple[Any, Any] | None = None
        thread = threading.Thread(target=self._look, name="gradctl-self-test", daemon=True)
        thread.start()
        thread.join()

    def _look(self) -> None:
        self._keys = private.get("dispatch_included")(), private.get("dispatch_excluded")()
        if not self._leaf.requires_grad:  # made under a mode that keeps leaves from requiring a gradient
            self._guard = private.get("dispatch_guard")
        self._leaf = torch.ones((), device="cpu", requires_grad=True)

    @contextmanager
    def plain(self) -> Generator[Any]:
        """Hide every mode of this thread; gives the leaf."""
        assert self._keys is not None
        with torch._C.DisableTorchFunction(), self._guard(*self._keys):
            yield self._leaf

    def records(self) -> bool:
        """Run one operation with gradients enabled; whether its result has a graph."""
        assert self._keys is not None
        is_enabled, set_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
        with torch._C.DisableTorchFunction(), self._guard(*self._keys):
            before = is_enabled()
            set_enabled(True)
            try:
                return (-self._leaf).requires_grad
            finally:
                set_enabled(before)
