"""float64 in the place of float32: for tensors, for what is created, and for the casts of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradctl._finite_difference._point import Subject

_RAISED = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_CASTS: dict[Any, Any] = {Tensor.float: Tensor.double}


def differentiable(tensor: Tensor) -> bool:
    """Say whether a tensor is of a dtype that has derivatives."""
    return tensor.is_floating_point() or tensor.is_complex()


def double(tensor: Tensor) -> Tensor:
    """Return a floating tensor in float64, a complex one in complex128, others as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def as_given(tensor: Tensor) -> Tensor:
    """Return the tensor itself."""
    return tensor


class double_by_default:  # noqa: N801  (used as a function)
    """Make what a function creates float64 as well, inside the block."""

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)


class _CastsRaised(TorchFunctionMode):
    """Reads float32 as float64 in every torch call: `logits.float()` was meant to raise the precision, not to round."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [_RAISED.get(each, each) if isinstance(each, torch.dtype) else each for each in args]
        named = {k: _RAISED.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return _CASTS.get(func, func)(*given, **named)


def with_casts_raised(subject: Subject) -> Subject:
    """Return the subject whose forward casts to float64 where it says float32; its backward is not touched."""
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]] = subject.run

    def raised(leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        with _CastsRaised():
            return run(leaves)

    return replace(subject, run=raised)
