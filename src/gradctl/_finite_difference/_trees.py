"""Tensors in nested arguments and results: their names in order, and the same structure with other tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def tensors(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Return every tensor of a nested value with its path: `state[1]`, `batch.mask`."""
    found: list[tuple[str, Tensor]] = []
    replaced(value, lambda path, tensor: found.append((path, tensor)) or tensor, name)
    return found


def replaced(value: Any, by: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """Return the same structure with every tensor replaced by `by(path, tensor)`; what is no container stays.

    Lists, tuples (named ones too), mappings and dataclasses are entered; a mapping comes back as its own type where
    that can be built from pairs, else as a dict.
    """
    if isinstance(value, Tensor):
        return by(name, value)
    if isinstance(value, (list, tuple)):
        parts: list[Any] = [replaced(part, by, f"{name}[{i}]") for i, part in enumerate(value)]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        pairs = {key: replaced(part, by, f"{name}[{key!r}]") for key, part in value.items()}
        if all(pairs[key] is value[key] for key in value):
            return value
        try:
            return type(value)(pairs)  # pyright: ignore[reportCallIssue]
        except TypeError:
            return pairs
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        new = {field: replaced(getattr(value, field), by, f"{name}.{field}") for field in fields}
        if all(new[field] is getattr(value, field) for field in fields):
            return value
        return dataclasses.replace(value, **new)
    return value
