"""What an evaluation may move besides its tensors: the states of random generators, put back each time."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch


class RandomStates:
    """The states of all random generators that a function may draw from; `restore` puts them back.

    Those of torch on every device that is in use, of Python and, when it is loaded, of NumPy.

    Args:
        others: further generators, which a module or a closure holds.
    """

    def __init__(self, others: Sequence[torch.Generator] = ()) -> None:
        self._undo: list[Callable[[], Any]] = []
        cpu, python = torch.get_rng_state(), random.getstate()
        self._undo += [lambda: torch.set_rng_state(cpu), lambda: random.setstate(python)]
        for module in (torch.cuda, torch.mps, torch.xpu):
            self._keep_device(module)
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            state = numpy.random.get_state()
            self._undo.append(lambda: numpy.random.set_state(state))
        for generator in others:
            self._keep(generator)

    def _keep_device(self, module: Any) -> None:
        if not module.is_available():
            return
        if module is torch.mps:
            state = module.get_rng_state()
            self._undo.append(lambda: module.set_rng_state(state))
        elif module.is_initialized():
            states = module.get_rng_state_all()
            self._undo.append(lambda: module.set_rng_state_all(states))

    def _keep(self, generator: torch.Generator) -> None:
        state = generator.get_state()
        self._undo.append(lambda: generator.set_state(state))

    def restore(self) -> None:
        """Put every generator back to where it was when this object was made."""
        for undo in self._undo:
            undo()

    def __enter__(self) -> RandomStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
