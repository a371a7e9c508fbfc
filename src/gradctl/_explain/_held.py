"""What an optimizer holds, and in which state each gradient was at its steps: there, missing, zero or not finite."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl import _torch_private as private
from gradctl._lineage._numbers import read_numbers

DENSE = 3
"""Each of the first so many steps is looked at; later ones as far as their share of the time allows."""
_SHARE = 0.004
_SOON = 8
TINY = 1e-18
_HUGE = 1e30
_dispatch_off: Any = private.find("disable_dispatch") or contextlib.nullcontext


def held_by(optimizer: Any) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, Tensor)]


class Held:
    """One optimizer.

    Args:
        optimizer: it; only weak references to it and to its parameters are kept.

    Attributes:
        steps: how many it has made.
        lost: for a parameter (by position) that had a gradient before, the step at which it had none.
        zero: for a position, the step since which its gradient is exactly zero (or below 1e-18).
        bad: for a position, the step at which its gradient was first not finite, or beyond 1e30.
        left_out: how many of the last backwards, without a break, were not finite and cleared without a step.
        left_bad: the positions of which that was so.
        pending: whether the backward since then is not finite either.
        uncleared: the first step that used gradients of the step before, still uncleared.
        cleared: the first step before which the gradients of a backward were cleared.
        shared: the first step at which two parameters had the same memory as gradient.
        names: the FQN of each position, as far as anything names it.
        cleared_at: the place of the last clearing in the order of events; -1 for none.
        stepped_at: that of the last step.
    """

    def __init__(self, optimizer: Any) -> None:
        self.ref = weakref.ref(optimizer)
        self.steps = 0
        self.params: list[weakref.ref[Tensor]] = []
        self.names: list[str | None] = []
        self.ids: list[int] = []
        self.lost: dict[int, int] = {}
        self.zero: dict[int, int] = {}
        self.bad: dict[int, int] = {}
        self.left_out = 0
        self.left_bad: set[int] = set()
        self.pending = False
        self.uncleared: int | None = None
        self.cleared: int | None = None
        self.shared: int | None = None
        self.cleared_at = -1
        self.stepped_at = -1
        self._unused = 0
        self._ever: list[bool] = []
        self._missing: list[bool] = []
        self._trained: list[bool] = []
        self._last: dict[int, weakref.ref[Tensor]] = {}
        self._last_step = -1
        self._spent = 0.0
        self._begun = time.perf_counter()

    def stepped(self, optimizer: Any, order: int, last_backward: int) -> None:
        """Look at the gradients of the step that has just been made.

        Args:
            optimizer: it.
            order: the place of this step in the order of events.
            last_backward: that of the last backward; -1 when there was none.
        """
        self.steps += 1
        self.left_out, self._unused, self.pending = 0, 0, False
        if self.cleared is None and self.cleared_at > last_backward > self.stepped_at:
            self.cleared = self.steps
        fresh = last_backward > self.stepped_at >= self.cleared_at
        params = held_by(optimizer)
        ids = list(map(id, params))
        if ids != self.ids:
            self._bind(params, ids)
        missing = [p.grad is None for p in params]
        if missing != self._missing:
            self._changed(missing)
        now = time.perf_counter()
        if self.steps <= DENSE or self._spent <= _SHARE * (now - self._begun):
            self.check(params, fresh=fresh)
            self._spent += time.perf_counter() - now
        self.stepped_at = order

    def clears(self, order: int, last_backward: int) -> None:
        """Take note that the gradients are about to be cleared; look at what no step has used.

        Args:
            order: the place of this in the order of events.
            last_backward: that of the last backward; -1 when there was none.
        """
        if self.steps and last_backward > max(self.stepped_at, self.cleared_at):
            # Once between two steps is common: a gradient that flowed through a discriminator, for one.
            self._unused += 1
            now = time.perf_counter()
            if self._unused > 1 and (self._unused <= _SOON or self._spent <= _SHARE * (now - self._begun)):
                self.left_out = (self.left_out or 1) + 1 if self._is_bad() else 0
                self._spent += time.perf_counter() - now
            elif self.left_out:
                self.left_out += 1
        self.pending = False
        self.cleared_at = order

    def went_back(self) -> None:
        """After a backward: look whether what was left out goes on."""
        if self.left_out:
            self.pending = self._is_bad()

    def _is_bad(self) -> bool:
        grads = [(place, p.grad) for place, ref in enumerate(self.params) if (p := ref()) is not None]
        there = [(place, grad) for place, grad in grads if grad is not None]
        sizes = largest([grad for _, grad in there])
        bad = {place for (place, _), size in zip(there, sizes, strict=True) if size is not None and not size < _HUGE}
        self.left_bad = bad or self.left_bad
        return bool(bad)

    def never(self, *, frozen: bool) -> list[int]:
        """Return the positions of what was never given a gradient.

        Args:
            frozen: of what requires none, or of what requires one.
        """
        return [
            position
            for position, ever in enumerate(self._ever)
            if not ever and self._missing[position] and self._trained[position] is not frozen
        ]

    def check(self, params: Sequence[Tensor] | None = None, *, fresh: bool = False) -> None:
        """Look at the numbers of the gradients, and at whose they are.

        Args:
            params: what the optimizer holds, if the caller knows it.
            fresh: a backward has run since the last step, and nothing was cleared since then.
        """
        if params is None:
            params = [p for ref in self.params if (p := ref()) is not None]
            if len(params) != len(self.params):
                return
        self._trained = [p.requires_grad for p in params]
        grads = [(position, grad) for position, p in enumerate(params) if (grad := p.grad) is not None]
        for (position, _), size in zip(grads, largest([grad for _, grad in grads]), strict=True):
            if size is None:
                continue
            if not size < _HUGE:
                self.bad.setdefault(position, self.steps)
            if size < TINY:
                self.zero.setdefault(position, self.steps)
            else:
                self.zero.pop(position, None)
        self._whose(grads, fresh)

    def _bind(self, params: list[Tensor], ids: list[int]) -> None:
        # Groups are added at the end; any other change starts anew.
        kept = len(self.ids) if ids[: len(self.ids)] == self.ids else 0
        if not kept:
            self._ever, self._missing, self._trained, self._last, self.names = [], [], [], {}, []
            for states in (self.lost, self.zero, self.bad):
                states.clear()
        more = params[kept:]
        self.ids = ids
        self.params = [*self.params[:kept], *(weakref.ref(p) for p in more)]
        self._ever += [False] * len(more)
        self._missing += [True] * len(more)
        self._trained += [p.requires_grad for p in more]
        self.names += [None] * len(more)

    def _changed(self, missing: list[bool]) -> None:
        for position, gone in enumerate(missing):
            if not gone:
                self._ever[position] = True
            elif self._ever[position] and position not in self.lost:
                self.lost[position] = self.steps
        self._missing = missing

    def _whose(self, grads: Sequence[tuple[int, Tensor]], fresh: bool) -> None:
        """Look for gradients that are still those of the step before, and for two that share their memory."""
        if self.uncleared is None:
            last = self._last if fresh and self._last_step == self.steps - 1 else {}
            if any(position in last and last[position]() is grad for position, grad in grads):
                self.uncleared = self.steps
            self._last = {position: weakref.ref(grad) for position, grad in grads}
            self._last_step = self.steps
        if self.shared is None:
            seen: set[int] = set()
            for _, grad in grads:
                if type(grad) is not Tensor or grad.layout is not torch.strided or grad.device.type == "meta":
                    continue
                pointer = grad.data_ptr()
                if pointer and pointer in seen:
                    self.shared = self.steps
                seen.add(pointer)


def largest(tensors: Sequence[Tensor]) -> list[float | None]:
    """Return the largest absolute entry of each tensor, NaN where there is one; None for what cannot be read."""
    found: list[float | None] = [None] * len(tensors)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return found  # nothing may be added to a CUDA graph, and nothing waited for
    readable: list[int] = []
    norms: list[Tensor] = []
    with torch._C.DisableTorchFunction(), _dispatch_off(), torch.no_grad():
        for position, tensor in enumerate(tensors):
            if type(tensor) not in (Tensor, Parameter) or tensor.device.type == "meta" or tensor.is_nested:
                continue
            if tensor.layout is torch.sparse_coo:
                tensor = tensor._values()
            if tensor.layout is not torch.strided or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            if tensor.numel():
                readable.append(position)
                norms.append(torch.linalg.vector_norm(tensor.detach(), float("inf")))
        for position, number in zip(readable, read_numbers(norms), strict=True):
            found[position] = number
    return found
