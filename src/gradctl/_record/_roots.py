"""What the graph says about a loss that goes into backward: a mean, a sum, divided by hand, scaled by a scaler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

Kind = Literal["mean", "sum", "divided", "other"]
_MARK = "gradctl.scaled"
_MOST = 64
_PASSED = (
    "ToCopyBackward", "CloneBackward", "SqueezeBackward", "ViewBackward", "UnsqueezeBackward", "AliasBackward",
    "ReshapeAliasBackward", "ExpandBackward",
)  # fmt: skip
_MEAN, _SUM = 1, 2


def mark_scaled(result: Any) -> None:
    """Leave a mark on the graph of what a scaler has returned."""
    for tensor in result if isinstance(result, list | tuple) else (result,):
        node = getattr(tensor, "grad_fn", None)
        if node is not None:
            node.metadata[_MARK] = True


def read_root(root: Any, *, marks: bool) -> tuple[Kind, bool]:
    """Return what kind of loss a root is, a scaler's factor passed over, and whether a scaler has scaled it.

    Args:
        root: what was handed to backward.
        marks: whether `mark_scaled` was ever called.
    """
    with torch._C.DisableTorchFunction():
        node = root.grad_fn
        if node is None:
            return "other", False
        if not marks:
            return _kind(node), False
        if _MARK in node.metadata:
            inside = _single(node)
            return ("other" if inside is None else _kind(inside)), True
        if any(_MARK in found.metadata for found in _near(node)):
            return "divided", True  # something was done to the scaled loss
        return _kind(node), False


def _near(node: Any) -> Iterator[Any]:
    waiting, seen = [node], 0
    while waiting and seen < _MOST:
        at = waiting.pop(0)
        seen += 1
        yield at
        waiting += [following for following, _ in at.next_functions if following is not None]


def _single(node: Any) -> Any:
    """Return the only function before `node` that carries a gradient; None if there are more or none."""
    found = [following for following, _ in node.next_functions if following is not None]
    return found[0] if len(found) == 1 else None


def _is_factor(node: Any) -> bool:
    """Whether `node` multiplies or divides by something without a gradient."""
    name = node.name()
    return name.startswith(("MulBackward", "DivBackward")) and _single(node) is not None


def _kind(node: Any, depth: int = 0) -> Kind:
    while True:
        name = node.name()
        if _is_factor(node):
            return "divided"
        inside = _single(node)
        if name.startswith(_PASSED) and inside is not None:
            node = inside
            continue
        break
    if name.startswith(("AddBackward", "SubBackward")) and depth < _MOST:
        kinds = {_kind(following, depth + 1) for following, _ in node.next_functions if following is not None}
        # One undivided mean among the terms is one that grows with the number of microbatches.
        return "mean" if "mean" in kinds else "other"
    if name.startswith("MeanBackward"):
        # A mean of weighted rows may hold the division in its weights.
        return "other" if inside is not None and _is_factor(inside) else "mean"
    if name.startswith("SumBackward"):
        return "sum"
    reduction = getattr(node, "_saved_reduction", None)
    return "mean" if reduction == _MEAN else "sum" if reduction == _SUM else "other"
