"""Which dtype an operation on the way computes in, seen from below autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradctl import _torch_private


def lower_operation(run: Callable[[], object], than: torch.dtype) -> tuple[str, str] | None:
    """Run something and name the first operation that rounds to a lower floating dtype; to the lowest one, if several.

    Args:
        run: what is run.
        than: float64 or float32.

    Returns:
        The dtype and the operation, or None when nothing is rounded, or when this torch cannot tell.
    """
    base: Any = _torch_private.find("dispatch_mode")
    if base is None:
        return None
    limit = torch.finfo(than).eps
    seen: dict[float, tuple[str, str]] = {}

    class Watching(base):  # pyright: ignore[reportUntypedBaseClass, reportGeneralTypeIssues]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            came = max((1 / _eps(each) for each in args if _floats(each)), default=0.0)
            for each in result if isinstance(result, (tuple, list)) else (result,):
                # A constant that was made in a lower dtype is exact; a value that goes down to one is rounded.
                if _floats(each) and limit < _eps(each) and 1 / _eps(each) < came:
                    seen.setdefault(
                        _eps(each), (str(each.dtype).removeprefix("torch."), str(func).removeprefix("aten."))
                    )
            return result

    with Watching():
        run()
    return seen[max(seen)] if seen else None


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _eps(value: Any) -> float:
    return torch.finfo(value.dtype).eps
