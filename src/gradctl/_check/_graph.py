"""What the graph of a forward tells about its tensors: rows without gradient, hidden leaves, authors of backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Graph:
    """What was seen.

    Args:
        padding: rows of an embedding that get no gradient by design, by index of the leaf.
        padded: names of the leaves with such rows.
        frozen: names of the leaves of which some rows are frozen.
        hidden: leaves that require a gradient and were not put in.
        authors: classes of `autograd.Function` that take the leaf or what is computed from it, by index of the leaf;
            those that take it itself come first.
    """

    padding: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    padded: list[str] = field(default_factory=list[str])
    frozen: list[str] = field(default_factory=list[str])
    hidden: list[Tensor] = field(default_factory=list[Tensor])
    authors: list[type] = field(default_factory=list[type])


def read(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> Graph:
    """Walk the graph of the outputs."""
    index = {id(leaf): i for i, leaf in enumerate(leaves)}
    found = Graph()
    waiting: list[Any] = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in index:
            found.hidden.append(leaf)
        author = getattr(type(node), "_forward_cls", None)
        if isinstance(author, type) and author not in found.authors:
            found.authors.append(author)
        row = _padding(node)
        for before, _ in node.next_functions:
            if row is not None:
                weight = getattr(before, "variable", None)
                if id(weight) in index:
                    found.padding.setdefault(index[id(weight)], []).append(row)
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return found


def _padding(node: Any) -> int | None:
    """Return the row that an embedding leaves without gradient; torch counts a missing one from the end, unsigned."""
    if not type(node).__name__.startswith("Embedding"):
        return None
    row = getattr(node, "_saved_padding_idx", None)
    return row if isinstance(row, int) and 0 <= row < 1 << 62 else None


def still_rows(leaf: Tensor, rows: Sequence[int]) -> Tensor:
    """Return a mask of the leaf's shape that is zero in these rows."""
    mask = torch.ones_like(leaf)
    mask[list(rows)] = 0
    return mask
