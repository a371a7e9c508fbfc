"""The numbers of the forward: which operation first made a NaN or an infinity, and from what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradctl import _torch_private as private
from gradctl._lineage._node import Node
from gradctl._lineage._numbers import describe, magnitude, norm_of, read_numbers, readable

_MOST = 256
_DESCRIBED = 24


@dataclass(slots=True)
class Flag:
    """A value that depends on parameters and is not finite.

    Attributes:
        node: the operation that made it.
        nan, high, low: whether there is a NaN, an infinity, a negative infinity; all False when only "not finite" is
            known (values on a device are read late, and only once).
        operands: what its tensor arguments looked like (see `_numbers.describe`), in the order of `node.inputs` as far
            as the operation gives them; empty where they were not looked at.
        step: number of optimizer steps before it.
    """

    node: Node
    step: int
    nan: bool = False
    high: bool = False
    low: bool = False
    operands: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class ForwardCheck:
    """Looks at each value that depends on parameters; keeps the flags of this generation only."""

    def __init__(self) -> None:
        self.flags: list[Flag] = []
        self.paused = False
        self._pending: list[tuple[Node, Tensor, int]] = []
        self._dispatch_off = private.get("disable_dispatch")

    def look(self, node: Node, tensor: Tensor, arguments: Sequence[Tensor], step: int) -> None:
        """Flag `tensor` if it is not finite; torch functions are off already."""
        if self.paused or len(self.flags) >= _MOST or not readable(tensor) or torch.is_inference_mode_enabled():
            return
        with self._dispatch_off():
            tensor = tensor.detach()
            if tensor.device.type != "cpu":
                self._pending.append((node, norm_of(tensor), step))
                return
            size = magnitude(tensor)
            if size - size == 0.0:
                return
            flag = Flag(node, step)
            if size != size:
                flag.nan = True
            else:
                flag.high, flag.low = bool((tensor == math.inf).any()), bool((tensor == -math.inf).any())
            if len(self.flags) < _DESCRIBED:
                flag.operands = [describe(argument) for argument in arguments[:4] if argument is not tensor]
            self.flags.append(flag)

    def settle(self) -> None:
        """Read what waits on a device."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        numbers = read_numbers([norm for _, norm, _ in pending])
        self.flags += [
            Flag(node, step, nan=number != number, high=number == number)
            for (node, _, step), number in zip(pending, numbers, strict=True)
            if number - number != 0.0
        ][: _MOST - len(self.flags)]

    @property
    def waiting(self) -> int:
        """How many values wait to be read."""
        return len(self._pending)

    def clear(self) -> None:
        """Forget this generation's flags."""
        self.flags = []
