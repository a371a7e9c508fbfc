"""Nested arguments and results as flat lists of tensors, which is all that an autograd.Function sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gradctl._custom_grad._arguments import pytree


@dataclass(frozen=True, slots=True)
class Layout:
    """How a nest of tensors and other values is put together again.

    Args:
        spec: the nesting.
        holes: whether each leaf is a tensor.
        others: the leaves that are none.
    """

    spec: Any
    holes: tuple[bool, ...]
    others: tuple[Any, ...]

    def names(self, name: str) -> list[str]:
        """Return the place of each tensor: `pair[0]`, `state['h']`."""
        tree = pytree.tree_unflatten(list(range(len(self.holes))), self.spec)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
        return [name + path for path, hole in zip(paths, self.holes, strict=True) if hole]


class Nest(NamedTuple):
    """The tensors of a nest, and what is left when they are taken out.

    Args:
        tensors: the tensors, in order.
        layout: how to put them together; None for one tensor alone, `FLAT` for a tuple of tensors, a tuple of layouts
            for arguments one by one.
    """

    tensors: Sequence[Tensor]
    layout: Layout | tuple[Layout, ...] | str | None


FLAT = "flat"


def pack(tree: Any) -> Nest:
    """Take the tensors out of a nest; one tensor, or a plain tuple of them, costs next to nothing."""
    if isinstance(tree, Tensor):
        return Nest((tree,), None)
    if type(tree) is tuple:
        for item in tree:
            if not isinstance(item, Tensor):
                break
        else:
            return Nest(tree, FLAT)
    tensors, layout = _taken_apart(tree)
    return Nest(tensors, layout)


def pack_arguments(args: tuple[Any, ...]) -> Nest:
    """Take the tensors out of arguments, each of which keeps a layout of its own."""
    for argument in args:
        if not isinstance(argument, Tensor):
            break
    else:
        return Nest(args, FLAT)
    parts = [_taken_apart(argument) for argument in args]
    return Nest(
        tuple(tensor for tensors, _ in parts for tensor in tensors),
        tuple(layout for _, layout in parts),
    )


def unpack(tensors: Sequence[Any], layout: Layout | tuple[Layout, ...] | str | None) -> Any:
    """Put a nest together again, with `tensors` (or what stands for them) in their places."""
    if layout is None:
        return tensors[0]
    if layout == FLAT:
        return tuple(tensors)
    assert not isinstance(layout, str)
    ours = iter(tensors)
    if isinstance(layout, tuple):
        return tuple(_together(ours, part) for part in layout)
    return _together(ours, layout)


def _taken_apart(tree: Any) -> tuple[tuple[Tensor, ...], Layout]:
    leaves, spec = pytree.tree_flatten(tree)
    holes = tuple(isinstance(leaf, Tensor) for leaf in leaves)
    others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)), Layout(spec, holes, others)


def _together(tensors: Iterator[Any], layout: Layout) -> Any:
    others = iter(layout.others)
    return pytree.tree_unflatten([next(tensors if hole else others) for hole in layout.holes], layout.spec)
