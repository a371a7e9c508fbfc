"""What a function reads from around itself although it requires a gradient."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module


def captured(function: Any, results: list[Tensor]) -> str:
    """Name the tensor behind `results` that requires a gradient and came in from around `function`."""
    leaves = _leaves(results)
    for name, tensor in _around(function):
        if tensor in leaves or any(tensor is result for result in results):
            return f"`{name}`"
    return f"a tensor of shape {list(next(iter(leaves.values())).shape)}" if leaves else "a tensor"


class _ById(dict[int, Tensor]):
    def __contains__(self, key: object) -> bool:
        return super().__contains__(id(key)) if isinstance(key, Tensor) else super().__contains__(key)


def _leaves(results: list[Tensor]) -> _ById:
    found, seen = _ById(), set[Any]()
    open_nodes = [result.grad_fn for result in results if result.grad_fn is not None]
    while open_nodes:
        node: Any = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        open_nodes.extend(after for after, _ in node.next_functions if after is not None)
    return found


def _around(function: Any) -> Iterator[tuple[str, Tensor]]:
    holder = getattr(function, "__self__", None)
    names: dict[str, Any] = {} if holder is None else {"self": holder}
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if inspect.isfunction(plain):
        around = inspect.getclosurevars(plain)
        names |= {**around.globals, **around.nonlocals}
    for name, value in names.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Module):
            for below, parameter in value.named_parameters():
                yield f"{name}.{below}", parameter
        elif not isinstance(value, type) and hasattr(value, "__dict__"):
            for below, held in vars(value).items():
                if isinstance(held, Tensor):
                    yield f"{name}.{below}", held
