"""Float32 weights with 16-bit copies for the forward and its backward.

The parameters are the program's own all the time. While the *window* is open their data are the copies: from the
beginning of a forward until its backward has run, so that a recompute in the backward (activation checkpointing) sees
what the forward saw. Outside of the window the model, its optimizers and everything that reads or writes them are those
of the float32 program: state_dicts, weights changed by hand, clamps, averages, groups that are added.

Gradients are float32: the leaf says so to autograd (`Tensor.grad_dtype`), which casts each 16-bit gradient as it
arrives and adds it up in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl import _torch_private as private


class Masters:
    """Float32 parameters, replaced by 16-bit copies while the window is open.

    Args:
        named: the parameters, float32 or `dtype`; the latter become float32 until `remove`.
        dtype: of the copies.
    """

    def __init__(self, named: Mapping[str, Parameter], dtype: torch.dtype) -> None:
        self._parameters = list(named.values())
        self._were = [parameter.dtype for parameter in self._parameters]
        self._dtype = dtype
        self._copies: list[Tensor] = []
        self._masters: list[Tensor] = []
        self._versions: list[int] = []
        with torch.no_grad():
            for parameter in self._parameters:
                widen(parameter)

    @property
    def is_open(self) -> bool:
        """Whether the parameters' data are the copies."""
        return bool(self._masters)

    def open(self) -> None:
        """Put the copies, cast afresh, in place of the weights; an open window stays as it is."""
        if self._masters or not self._parameters:
            return
        masters = [parameter.data for parameter in self._parameters]
        if not all(map(_same_place, self._copies, masters)) or len(self._copies) != len(masters):
            self._copies = [torch.empty_like(master, dtype=self._dtype) for master in masters]
        copy_all(self._copies, masters)
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.data = copy
        self._masters = masters
        self._versions = [parameter._version for parameter in self._parameters]

    def close(self) -> None:
        """Put the weights back. What the program has written into a copy meanwhile is taken over."""
        masters, self._masters = self._masters, []
        if not masters:
            return
        for parameter, master, copy, version in zip(
            self._parameters, masters, self._copies, self._versions, strict=True
        ):
            if parameter._version != version or parameter.data_ptr() != copy.data_ptr():
                written = parameter.data
                changed = master.to(written.dtype) != written
                master.copy_(torch.where(changed, written.to(master.dtype), master))
            parameter.data = master

    def remove(self) -> None:
        """Close the window and give every parameter the dtype that it had."""
        self.close()
        with torch.no_grad():
            for parameter, dtype in zip(self._parameters, self._were, strict=True):
                give_dtype(parameter, dtype)
        self._parameters, self._copies = [], []


def copy_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes, casting; in one call where torch has it."""
    foreach = private.find("foreach_copy")
    if foreach is not None:
        with torch.no_grad():
            foreach(into, values)
        return
    for target, value in zip(into, values, strict=True):
        target.detach().copy_(value)


def widen(parameter: Parameter) -> None:
    """Make a parameter and its gradient float32, and its gradients to come."""
    gradient, parameter.grad = parameter.grad, None
    parameter.grad_dtype = torch.float32
    if parameter.dtype is not torch.float32:
        parameter.data = parameter.data.float()
    if gradient is not None:
        parameter.grad = gradient.float()


def give_dtype(parameter: Parameter, dtype: torch.dtype) -> None:
    """Make a parameter, its gradient and its gradients to come `dtype`."""
    gradient, parameter.grad = parameter.grad, None
    if parameter.dtype is not dtype:
        parameter.data = parameter.data.to(dtype)
    parameter.grad_dtype = dtype
    if gradient is not None:
        parameter.grad = gradient.to(dtype)


def _same_place(copy: Tensor, master: Tensor) -> bool:
    return copy.shape == master.shape and copy.device == master.device and copy.stride() == master.stride()
