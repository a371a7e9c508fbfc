"""The book of names: listens to registration, keeps weak references, answers requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Module

from gradctl import _taps
from gradctl._names._search import Memory, Naming, module_names, search


class NameBook:
    """Remembers modules as they are built, and names parameters on request. All references are weak.

    Attributes:
        faults: the text of what went wrong while listening or reading; the program never sees it. At most ten.
    """

    def __init__(self) -> None:
        self._memory = Memory()
        self._handles: list[_taps.Handle] = []
        self._lock = threading.RLock()

    @property
    def faults(self) -> list[str]:
        """What went wrong inside, as text."""
        return self._memory.faults

    def start(self) -> None:
        """Listen to the registration of parameters and submodules from now on; a second call does nothing."""
        if self._handles:
            return
        # Both are needed: a container holds no parameter, and a model that is one layer holds no submodule.
        self._handles = [
            _taps.parameter_registered.subscribe(self._remember),
            _taps.module_registered.subscribe(self._remember),
        ]

    def stop(self) -> None:
        """Stop listening and forget every module and name."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        self._memory.forget()

    def names_for(self, params: Sequence[Tensor], *, given: Sequence[str | None] | None = None) -> Naming:
        """Name `params`, cheapest look first.

        Args:
            params: tensors as an optimizer or a backward call holds them (DTensors too: only their identity counts).
            given: names that the program itself attached (`param_groups[...]["param_names"]`), used for tensors that
                no module holds.
        Returns:
            The names; no two tensors of one request share one.
        """
        begin = time.perf_counter()
        with self._lock:
            naming = search(self._memory, params, given)
        naming.seconds = time.perf_counter() - begin
        return naming

    def modules(self) -> dict[int, str]:
        """Return the FQN of every module below the models that gave names, by `id`; the outermost is its class."""
        with self._lock:
            return module_names(self._memory)

    def renew_lock(self) -> None:
        """Replace the lock in a forked child, where the thread that held it may no longer exist."""
        self._lock = threading.RLock()

    def _remember(self, module: Module, name: str, value: object) -> None:
        try:
            self._memory.remember(module)
        except Exception as fault:
            self._memory.note(fault)
