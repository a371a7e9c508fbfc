"""The loss head in fewer bytes: the gradient of log-softmax is written over the gradient that came in.

Backward of a cross-entropy has three tensors of the size of the logits at once: the log-probabilities, their gradient,
and the gradient of the logits. The kernel of the last reads each element of the other two once, where it writes, so it
may write over the gradient that came in. That is done where nobody else holds that gradient. The result has the same
bits: it is the same kernel.

The log-probabilities are handed out in backward as a tensor of a type of its own, which knows what to do when that
kernel is called with it and is an ordinary tensor for every other operation.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import Tensor

from gradctl import _torch_private as private
from gradctl._recompute import Tape

SMALLEST: Final = 1 << 16
"""Bytes of log-probabilities below which nothing is gained."""
Holders = tuple[int, int, int]
_kernel = torch.ops.aten._log_softmax_backward_data
_detach = torch.ops.aten.detach.default
_no_dispatch = private.get("no_torch_dispatch")
_uses_of = private.find("storage_uses")
_alone: dict[Any, Holders] = {}


class LogProbabilities(Tensor):
    """Log-probabilities as backward of a cross-entropy sees them.

    Attributes:
        alone: how often the gradient is held where nobody but autograd holds it; None while that is being found out.
        told: what hears of it meanwhile, and of the bytes that were not needed.
    """

    alone: Holders | None
    told: list[Any]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call an operation; the gradient of log-softmax is written over the one that came in."""
        found = next(value for value in args if type(value) is LogProbabilities)
        args = tuple([_plain(value) for value in args])
        if func is _detach:
            return handed_out(args[0], found.alone, found.told)  # autograd takes what a hook returns in this way
        if func is not _kernel.default:
            return func(*args, **(kwargs or {}))
        grad = args[0]
        assert _uses_of is not None, "nothing is handed out without it"
        holders = _uses_of(grad.untyped_storage()._cdata), grad._use_count(), sys.getrefcount(grad)
        if found.alone is None:
            found.told.append(holders)
        elif holders == found.alone and _fits(*args):
            found.told.append(grad.nbytes)
            return _kernel.out(*args, out=grad)
        return func(*args)


def _fits(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> bool:
    return (
        not torch.is_grad_enabled()
        and type(grad) is Tensor
        and grad.is_cpu  # other devices were not measured
        and grad.dtype == output.dtype == dtype
        and grad.shape == output.shape
        and grad.is_contiguous()
        and output.is_contiguous()
        and grad.untyped_storage().nbytes() == grad.nbytes
    )


def _plain(value: Any) -> Any:
    if type(value) is not LogProbabilities:
        return value
    with _no_dispatch():
        return Tensor._make_subclass(Tensor, value)


def handed_out(tensor: Tensor, alone: Holders | None, told: list[Any]) -> Tensor:
    """Return log-probabilities as `LogProbabilities`."""
    with _no_dispatch():
        made = Tensor._make_subclass(LogProbabilities, tensor)
    made.alone = alone
    made.told = told
    return made


def _is_log_softmax(tensor: Tensor) -> bool:
    return type(tensor.grad_fn).__name__ == "LogSoftmaxBackward0"


def holders_where_alone() -> Holders | None:
    """Return how often a gradient is held on its way through a cross-entropy, under the modes around.

    It is found out with a cross-entropy of two numbers, once for each stack of modes.
    """
    if _uses_of is None:
        return None
    key = tuple(type(mode) for mode in _modes_around())
    if key not in _alone:
        told: list[Any] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (_is_log_softmax(tensor), tensor.detach()),
            lambda saved: handed_out(saved[1], None, told) if saved[0] else saved[1],
        )
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            start = torch.zeros(1, 2, device="cpu", dtype=torch.float32, requires_grad=True)
            with hooks:
                loss = torch.nn.functional.cross_entropy(start * 1, torch.zeros(1, device="cpu", dtype=torch.int64))
            torch.autograd.grad(loss, start)
        if len(told) != 1:
            return None
        _alone[key] = told[0]
    return _alone[key]


_modes_around = private.get("dispatch_modes")


class _Head:
    """What stands in autograd's graph for log-probabilities."""

    __slots__ = ("saved",)

    def __init__(self, saved: Any) -> None:
        self.saved = saved


class HeadInPlace(Tape):
    """A tape that hands log-probabilities out as `LogProbabilities`.

    Attributes:
        spared: bytes of each gradient that needed no place of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.alone = holders_where_alone()
        self.spared: list[int] = []
        super().__init__(*args, **kwargs)

    def pack(self, tensor: Tensor) -> Any:
        """Take a tensor that autograd saves, and mark log-probabilities."""
        saved = super().pack(tensor)
        if self.alone is not None and tensor.nbytes >= SMALLEST and _is_log_softmax(tensor):
            return _Head(saved)
        return saved

    def unpack(self, saved: Any) -> Tensor:
        """Return a saved tensor."""
        if type(saved) is _Head:
            return handed_out(super().unpack(saved.saved), self.alone, self.spared)
        return super().unpack(saved)
