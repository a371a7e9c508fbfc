"""How much a microbatch counts: its items, and what its loss says it was divided by.

The gradient of a step is that of one big batch: the sum over all items, divided by their number. A mean loss has been
divided by the number of its own items already, so it is multiplied by them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from gradctl._errors import UsageError

Items: TypeAlias = Literal["rows", "tokens"] | Callable[[Any], "int | float | Tensor"]
Reduction: TypeAlias = Literal["mean", "sum"]
IGNORED = -100
"""The label that torch's losses leave out unless told otherwise."""

_MEAN, _SUM = 1, 2  # at::Reduction
_NLL = ("NllLossBackward0", "NllLoss2DBackward0")
_BY_ELEMENT = (
    "MseLossBackward0",
    "SmoothL1LossBackward0",
    "HuberLossBackward0",
    "BinaryCrossEntropyBackward0",
    "BinaryCrossEntropyWithLogitsBackward0",
    "SoftMarginLossBackward0",
)


def items_of(rule: Items, microbatch: Any) -> float:
    """Count the items of a microbatch.

    Raises:
        UsageError: it cannot be counted by this rule.
    """
    if callable(rule):
        return as_count(rule(microbatch))
    tensors = _tensors(microbatch)
    if rule == "rows":
        sizes = [(name, tensor.shape[0]) for name, tensor in tensors if tensor.dim()]
        if not sizes:
            raise UsageError(
                'items="rows" and a microbatch without a tensor that has rows',
                what=f"it is a {type(microbatch).__name__}",
                fix="items=lambda microbatch: ..., which counts",
            )
        for name, size in sizes[1:]:
            if size != sizes[0][1]:
                raise UsageError(
                    f'items="rows" is ambiguous: {sizes[0][0]} has {sizes[0][1]}, {name} has {size}',
                    what="the tensors of a microbatch differ in their first dimension",
                    fix="items=lambda microbatch: ..., which counts",
                )
        return float(sizes[0][1])
    labels = microbatch.get("labels") if isinstance(microbatch, Mapping) else (tensors or [("", None)])[-1][1]
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise UsageError(
            'items="tokens" and no labels in the microbatch',
            what='the last tensor of a tuple, or the entry "labels" of a mapping, holds whole numbers',
            fix="items=lambda microbatch: ..., which counts what the loss is a mean over",
        )
    return float((labels != IGNORED).sum())


def as_count(items: Any) -> float:
    """Return a count as a number; reads a tensor.

    Raises:
        UsageError: it is negative, NaN, inf, or no number.
    """
    try:
        count = float(items.detach() if isinstance(items, Tensor) else items)
    except (TypeError, ValueError) as error:
        raise UsageError(f"items={items!r}", what="a number of items is needed") from error
    if not 0.0 <= count < math.inf:
        raise UsageError(f"items={count:g}", what="a number of items is zero or more")
    return count


def divisor_of(loss: Tensor) -> float | None:
    """Return what a mean loss was divided by, as its last operation remembers it; None if it does not tell."""
    node = loss.grad_fn
    kind = "" if node is None else node.name()
    try:
        if kind in _NLL and node._saved_reduction == _MEAN:  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            weight: Tensor = node._saved_total_weight  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            return float(weight) if weight.is_cpu else None
        if kind == "MeanBackward0":
            return float(math.prod(node._saved_self_sym_sizes))  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        if kind in _BY_ELEMENT and node._saved_reduction == _MEAN:  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            return float(node._saved_self.numel())  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    except (AttributeError, RuntimeError, TypeError):  # another torch, or the graph is gone
        return None
    return None


def check_loss(loss: Any) -> None:
    """Refuse what is no loss.

    Raises:
        UsageError: not a tensor with one element.
    """
    if not isinstance(loss, Tensor):
        raise UsageError(f"the loss is a {type(loss).__name__}", what="a tensor with one element is needed")
    if loss.numel() != 1:
        raise UsageError(
            f"the loss has shape {list(loss.shape)}",
            what="a tensor with one element is needed",
            fix='.mean(), or .sum() and Step(..., loss="sum")',
        )


def check_reduction(loss: Tensor, told: Reduction, accumulate: int) -> None:
    """Refuse a loss that is visibly something else than it was told to be.

    Args:
        loss: of one microbatch.
        told: what it is said to be.
        accumulate: microbatches of a step.

    Raises:
        UsageError: a mean told as a sum, a sum told as a mean, or a mean that is divided a second time.
    """
    node = loss.grad_fn
    if node is None:
        return
    kind = node.name()
    told_by = _reduction_of(node)
    if told == "sum" and told_by == "mean":
        raise UsageError(
            f'the loss is a mean ({kind}) and loss="sum" was told',
            what="it would be divided by the number of items a second time",
            fix='Step(..., loss="mean"), or reduction="sum" in the loss',
        )
    if told == "mean" and told_by == "sum":
        raise UsageError(
            f'the loss is a sum ({kind}) and loss="mean" was told',
            what="it would be multiplied by the number of items",
            fix='Step(..., loss="sum"), or reduction="mean" in the loss',
        )
    if accumulate > 1 and kind in ("DivBackward0", "MulBackward0"):
        number = _other(node)
        twice = number in (accumulate, float(accumulate)) if kind == "DivBackward0" else number == 1.0 / accumulate
        inner = node.next_functions[0][0] if node.next_functions else None
        if twice and inner is not None and _reduction_of(inner) == "mean":
            raise UsageError(
                f"the loss is divided by {accumulate}, and Step divides it again",
                what=f"it is a mean ({inner.name()}) times 1/{accumulate}, the number of microbatches",
                fix="leave the division to Step",
            )


def _reduction_of(node: Any) -> Reduction | None:
    kind = node.name()
    if kind == "MeanBackward0":
        return "mean"
    if kind in _NLL or kind in _BY_ELEMENT:
        found = getattr(node, "_saved_reduction", None)
        return "mean" if found == _MEAN else "sum" if found == _SUM else None
    return None


def _other(node: Any) -> float | None:
    """Return the number that a loss is divided or multiplied by, if it is a number of the program."""
    try:
        other = node._saved_other
        return float(other) if isinstance(other, Tensor) and other.dim() == 0 and not other.requires_grad else None
    except (AttributeError, RuntimeError):
        return None


def _tensors(microbatch: Any, name: str = "it") -> list[tuple[str, Tensor]]:
    if isinstance(microbatch, Tensor):
        return [(name, microbatch)]
    if isinstance(microbatch, Mapping):
        return [found for key, value in microbatch.items() for found in _tensors(value, str(key))]
    if isinstance(microbatch, (tuple, list)):
        return [found for index, value in enumerate(microbatch) for found in _tensors(value, f"{name}[{index}]")]
    return []


def check_microbatches(microbatches: Any, accumulate: int) -> list[Any]:
    """Return the microbatches of one step as a list.

    Raises:
        UsageError: there are none, too many, or it is one microbatch and not a list of them.
    """
    kind = type(microbatches).__name__
    if isinstance(microbatches, (Tensor, str, bytes, Mapping)) or not hasattr(microbatches, "__iter__"):
        raise UsageError(
            f"the microbatches are a {kind}",
            what="a step takes a list of microbatches, each as the loss function wants it",
            fix="step([batch], loss_fn)",
        )
    found = list(microbatches)
    looks_like_one = len(found) > 1 and all(isinstance(each, Tensor) for each in found) and not _alike(found)
    if looks_like_one or len(found) > accumulate:
        raise UsageError(
            f"a {kind} of {len(found)} tensors that differ in kind, in place of microbatches"
            if looks_like_one
            else f"{len(found)} microbatches for a step that accumulates {accumulate}",
            what="a step takes a list of microbatches, each as the loss function wants it",
            fix="step([(x, y)], loss_fn) for one microbatch"
            if looks_like_one
            else f"Step(..., accumulate={len(found)})",
        )
    if not found:
        raise UsageError("a step without microbatches", what="the list is empty")
    return found


def _alike(tensors: list[Tensor]) -> bool:
    first = tensors[0]
    return all(t.dtype is first.dtype and t.dim() == first.dim() for t in tensors[1:]) and (
        first.dim() < 3 or all(t.shape[2:] == first.shape[2:] for t in tensors[1:])
    )
