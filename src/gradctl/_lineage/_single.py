"""Operations that normalise over a dimension, and whether that dimension has one entry only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradctl._lineage._node import Node
from gradctl._lineage._tracer import Tracer


def _along(position: int, default: int | None) -> Any:
    def length(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        dim = kwargs.get("dim", args[position] if len(args) > position else default)
        value = args[0]
        return value.shape[dim] if isinstance(dim, int) and value.dim() else 0

    return length


def _over_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    return math.prod(shape) if isinstance(shape, (list, tuple)) else int(shape)


def _over_group(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    groups = kwargs.get("num_groups", args[1] if len(args) > 1 else 0)
    return math.prod(args[0].shape[1:]) // groups if groups else 0


def _over_classes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return args[0].shape[1] if args[0].dim() > 1 else 0


def _over_keys(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    key = kwargs.get("key", args[1] if len(args) > 1 else None)
    return key.shape[-2] if isinstance(key, Tensor) else 0


NORMALISING = {
    "softmax": _along(1, None),
    "log_softmax": _along(1, None),
    "normalize": _along(2, 1),
    "cosine_similarity": _along(2, 1),
    "layer_norm": _over_shape,
    "rms_norm": _over_shape,
    "group_norm": _over_group,
    "cross_entropy": _over_classes,
    "scaled_dot_product_attention": _over_keys,
}
"""For each operation, a function that returns over how many entries it runs; 0 where that is not known."""


def note_single(tracer: Tracer, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Count the calls of a normalising operation from one place, and those that ran over a single entry."""
    if not args or not isinstance(args[0], Tensor):
        return
    single = NORMALISING[node.op](args, kwargs) == 1
    entry = tracer.facts.over_one.get(node.stack[:1])
    if entry is None:
        entry = tracer.facts.over_one[node.stack[:1]] = [node, 0, 0]
    entry[2] += 1
    if single:
        entry[0] = node
        entry[1] += 1
