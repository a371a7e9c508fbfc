"""Which parameters a program keeps the gradient from itself, by a call of gradctl: what they lack is meant."""

from __future__ import annotations

import os
import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gradctl._journal import Hearing, JournalWriter
from gradctl._record._faults import Faults
from gradctl._record._state import OptimizerState

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_DENSE = 16
_FARTHEST = 20_000
_MOST = 2_000


class KeptAway:
    """Follows values from which the gradient is kept away back to their leaves.

    Each line that does so is followed the first times, and then after twice as many calls each time: what stands behind
    it hardly ever changes.

    Args:
        journal: where it is written.
        faults: catches what goes wrong here.
    """

    def __init__(self, journal: JournalWriter, faults: Faults) -> None:
        self._journal = journal
        self._faults = faults
        self._calls: dict[Any, int] = {}
        self._leaves: dict[str, dict[int, weakref.ref[Tensor]]] = {"none": {}, "zero": {}}
        self._written: dict[tuple[int, str], int] = {}

    def listen(self) -> Hearing:
        """Begin to listen."""
        return Hearing(self._told)

    def write(self, state: OptimizerState) -> None:
        """Write which tensors of an optimizer are concerned, if they are more than what was written last."""
        for how, leaves in self._leaves.items():
            found = [n for n, key in enumerate(state.keys) if key in leaves and leaves[key]() is not None]
            if len(found) > self._written.get((state.o, how), 0):
                self._written[state.o, how] = len(found)
                self._journal.event("kept_away", o=state.o, n=state.steps, how=how, tensors=found[:_MOST])

    def forget(self) -> None:
        """Let go of what was remembered."""
        for leaves in self._leaves.values():
            leaves.clear()
        self._calls.clear()

    def _told(self, value: Tensor, how: str) -> None:
        try:
            caller: FrameType | None = sys._getframe(1)
            while caller is not None and caller.f_code.co_filename.startswith(_OURS):
                caller = caller.f_back
            key = (how, caller.f_code, caller.f_lasti) if caller is not None else how
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= _DENSE or calls & (calls - 1) == 0:
                with torch._C.DisableTorchFunction():
                    for leaf in _leaves_behind(value):
                        self._leaves[how][id(leaf)] = weakref.ref(leaf)
        except Exception as error:
            self._faults.caught("gradients kept away", error)


def _leaves_behind(value: Tensor) -> list[Tensor]:
    if value.is_leaf:
        return [value] if value.requires_grad else []
    found: list[Tensor] = []
    queue: list[Any] = [value.grad_fn]
    seen = set(queue)
    while queue and len(seen) < _FARTHEST:
        function = queue.pop()
        leaf = getattr(function, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        for following, _ in function.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    return found
