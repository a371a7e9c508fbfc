"""Float32 weights with 16-bit copies for the forward and its backward.

The parameters are the program's own all the time. While the *window* is open their data are the copies: from the
beginning of a forward until its backward has run, so that a recompute in the backward (activation checkpointing) sees
what the forward saw. Outside of the window the model, its optimizers and everything that reads or writes them are those
of the float32 program: state_dicts, weights changed by hand, clamps, averages, groups that are added.

Gradients are float32: the leaf says so to autograd (`Tensor.grad_dtype`), which casts each 16-bit gradient as it
arrives and adds it up in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl import _torch_private as private


class Masters:
    """Float32 parameters, replaced by 16-bit copies while the window is open.

    Args:
        named: the parameters, float32 or `dtype`; the latter become float32 until `remove`.
        dtype: of the copies.

    Attributes:
        is_open: whether the parameters' data are the copies.
    """

    def __init__(self, named: Mapping[str, Parameter], dtype: torch.dtype) -> None:
        self._parameters = list(named.values())
        self._were = [parameter.dtype for parameter in self._parameters]
        self._dtype = dtype
        self.is_open = False
        with torch.no_grad():
            for parameter in self._parameters:
                widen(parameter)
        self._masters = [parameter.data for parameter in self._parameters]
        self._copies = [torch.empty_like(master, dtype=dtype) for master in self._masters]
        self._versions: list[int] = []

    def open(self) -> None:
        """Put the copies, cast afresh, in place of the weights; an open window stays as it is."""
        if self.is_open:
            return
        for index, parameter in enumerate(self._parameters):
            if parameter.data_ptr() != self._masters[index].data_ptr():  # moved, or given other data by hand
                self._masters[index] = parameter.data
                self._copies[index] = torch.empty_like(parameter, dtype=self._dtype)
        copy_all(self._copies, self._masters)
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.data = copy
        self._versions = [parameter._version for parameter in self._parameters]
        self.is_open = True

    def close(self) -> None:
        """Put the weights back. What the program has written into a copy meanwhile is taken over."""
        if not self.is_open:
            return
        self.is_open = False
        for parameter, master, copy, version in zip(
            self._parameters, self._masters, self._copies, self._versions, strict=True
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
        self._parameters, self._masters, self._copies = [], [], []


def copy_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes, casting; in one call where torch has it."""
    foreach = _foreach_copy()
    with torch.no_grad():
        if foreach is not None:
            foreach(into, values)
        else:
            for target, value in zip(into, values, strict=True):
                target.copy_(value)


@functools.cache
def _foreach_copy() -> Any:
    return private.find("foreach_copy")


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
