"""Marks on the gradients that an optimizer will apply: which of them a backward reached, and who touched them since."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

from gradctl._record._gradients import parameters_of
from gradctl._record._quiet import Quiet, dispatch_modes

_MOST = 512
_SMALL = 4096
_READ = 8


class Marks(NamedTuple):
    """The state of the gradients of one optimizer: identity and version of each, and a few numbers of one."""

    grads: tuple[tuple[int, int] | None, ...]
    value: str

    def reached(self, before: Marks) -> tuple[int, ...]:
        """Return the indexes of the gradients that have changed since `before`."""
        if len(self.grads) != len(before.grads):
            return ()
        return tuple(index for index, mark in enumerate(self.grads) if mark != before.grads[index])


class Watched:
    """One optimizer whose gradients are looked at.

    Args:
        optimizer: held by a weak reference.
    """

    __slots__ = ("_probe", "reference")

    def __init__(self, optimizer: Any) -> None:
        self.reference = weakref.ref(optimizer)
        self._probe = -1

    def params(self) -> list[Any]:
        """Return its parameters; of very many an even choice."""
        optimizer = self.reference()
        params = [] if optimizer is None else parameters_of(optimizer)
        return params if len(params) <= _MOST else params[:: -(-len(params) // _MOST)]

    def marks(self) -> Marks:
        """Return the marks as they are now."""
        with torch._C.DisableTorchFunction():
            params = self.params()
            grads = [param.grad for param in params]
            # a gradient that was made in inference mode counts no versions
            found = tuple(
                None if grad is None else (id(grad), 0 if grad.is_inference() else grad._version) for grad in grads
            )
        return Marks(found, self._value(grads))

    def has_hooks(self) -> bool:
        """Whether a hook of the program may change a gradient on its way to the step."""
        optimizer = self.reference()
        if getattr(optimizer, "_optimizer_step_pre_hooks", None):
            return True
        with torch._C.DisableTorchFunction():
            return any(
                getattr(param, "_backward_hooks", None) or getattr(param, "_post_accumulate_grad_hooks", None)
                for param in self.params()
            )

    def _value(self, grads: list[Any]) -> str:
        """Read a few numbers: a change through `.data` leaves no other trace. Waits for no device."""
        if not 0 <= self._probe < len(grads) or grads[self._probe] is None:
            sizes = [
                (grad.numel(), index)
                for index, grad in enumerate(grads)
                if grad is not None and type(grad) is torch.Tensor and grad.is_cpu and grad.layout is torch.strided
            ]
            size, probe = min(sizes, default=(0, -1))
            if not 0 < size <= _SMALL:
                return ""
            self._probe = probe
        if dispatch_modes():
            with Quiet():
                return _first_numbers(grads[self._probe])
        return _first_numbers(grads[self._probe])


def _first_numbers(grad: torch.Tensor) -> str:
    return str(grad.detach().reshape(-1)[:_READ].tolist())
