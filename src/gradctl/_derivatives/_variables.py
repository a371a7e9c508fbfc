"""What is differentiated with respect to: tensors with names, and vectors of their shapes, structured or flat."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradctl._errors import UsageError

Wanted = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Tensor
"""A module (its trainable parameters), tensors by name, tensors in an order, or one tensor."""
Form = Literal["dict", "list", "tuple", "tensor"]


@dataclass(frozen=True, slots=True)
class Variables:
    """Tensors in an order, with names for messages, and the structure in which the caller gave them."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    form: Form

    @property
    def numel(self) -> int:
        """Elements of all tensors together: the length of a flat vector."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a flat vector: the widest of the tensors'."""
        found = self.tensors[0].dtype
        for tensor in self.tensors[1:]:
            found = torch.promote_types(found, tensor.dtype)
        return found

    @property
    def device(self) -> torch.device:
        """The one device of all tensors."""
        return self.tensors[0].device

    def pack(self, values: Sequence[Tensor]) -> Any:
        """Return `values`, one a tensor, in the caller's structure."""
        if self.form == "dict":
            return dict(zip(self.names, values, strict=True))
        if self.form == "tensor":
            return values[0]
        return list(values) if self.form == "list" else tuple(values)

    def flat(self, values: Sequence[Tensor]) -> Tensor:
        """Return `values`, one a tensor, as one vector [numel]."""
        dtype = self.dtype
        return torch.cat([value.reshape(-1).to(dtype) for value in values])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return the pieces of a vector [numel], in the shapes and dtypes of the tensors."""
        pieces = flat.split([tensor.numel() for tensor in self.tensors])
        return [piece.view(like.shape).to(like.dtype) for piece, like in zip(pieces, self.tensors, strict=True)]

    def is_flat(self, v: object) -> bool:
        """Whether `v` is a vector over all elements rather than values by tensor."""
        if isinstance(v, np.ndarray):
            return True
        if not isinstance(v, Tensor):
            return False
        return self.form != "tensor" or v.shape != self.tensors[0].shape

    def unpack(self, v: object, *, called: str = "v") -> list[Tensor]:
        """Return a vector of the caller's as one tensor for each of ours; shapes, dtypes and devices are held to ours.

        Raises:
            UsageError: `v` has not the structure, a shape, dtype or device of what it is a vector for.
        """
        if self.is_flat(v):
            return self.split(self._flat_of(v, called))
        if isinstance(v, Tensor):
            values: list[object] = [v]
        elif isinstance(v, nn.Module):
            raise UsageError(
                f"{called} is a module",
                what="a vector has one value for each element of the parameters",
                fix="pass a dict of tensors by name, or one flat vector",
            )
        elif isinstance(v, Mapping):
            by_name = cast("Mapping[str, object]", v)
            odd = [name for name in by_name if name not in self.names]
            missing = [name for name in self.names if name not in by_name]
            if odd or missing:
                raise UsageError(
                    f"{called} has {'no' if missing else 'a'} {(missing or odd)[0]!r}",
                    what=f"the names are {_few(self.names)}; {called} has {_few(tuple(map(str, by_name)))}",
                    fix=f"give {called} one tensor for each name, zeros where it does not move",
                )
            values = [by_name[name] for name in self.names]
        elif isinstance(v, Iterable):
            values = list(cast("Iterable[object]", v))
            if len(values) != len(self.tensors):
                raise UsageError(
                    f"{called} has {len(values)} tensors for {len(self.tensors)}",
                    what=f"they are {_few(self.names)}",
                    fix=f"give {called} one tensor for each, or one flat vector of {self.numel} elements",
                )
        else:
            raise UsageError(f"{called} is a {type(v).__name__}, neither tensors nor a flat vector")
        return [
            _like(value, tensor, f"{called}[{name!r}]" if self.form != "tensor" else called)
            for value, tensor, name in zip(values, self.tensors, self.names, strict=True)
        ]

    def _flat_of(self, v: object, called: str) -> Tensor:
        if isinstance(v, np.ndarray):
            if v.shape not in ((self.numel,), (self.numel, 1)):
                raise UsageError(f"{called} has shape {list(v.shape)}, not [{self.numel}]", fix=_SHAPES)
            return torch.from_numpy(np.ascontiguousarray(v).reshape(-1)).to(self.device, self.dtype)
        vector = cast("Tensor", v)
        if vector.shape != (self.numel,):
            raise UsageError(f"{called} has shape {list(vector.shape)}, not [{self.numel}]", fix=_SHAPES)
        return _like(vector, torch.empty(0, dtype=self.dtype, device=self.device).expand(0), called, shaped=False)


_SHAPES = "a flat vector has one element for each element of the parameters; other vectors have their structure"


def variables(wanted: Wanted, *, called: str = "params", needs_grad: bool = True) -> Variables:
    """Return the tensors to differentiate with respect to; of a module those that require gradients, each once.

    Args:
        wanted: a module, tensors by name, an iterable of tensors, or one tensor.
        called: the name of the argument, for messages.
        needs_grad: whether a tensor that does not require gradients is refused.
    Returns:
        Them, with names.
    Raises:
        UsageError: none is there, one is there twice, is not floating point, is frozen, or lies on another device.
    """
    form: Form
    if isinstance(wanted, nn.Module):
        found = {name: param for name, param in wanted.named_parameters() if param.requires_grad}
        if not found:
            raise UsageError(
                f"{type(wanted).__name__} has no parameter that requires a gradient",
                why="all are frozen" if any(True for _ in wanted.parameters()) else "it has no parameters",
                fix="unfreeze what the derivative is asked for, or pass the tensors themselves",
            )
        names, tensors, form = tuple(found), tuple(found.values()), "dict"
    elif isinstance(wanted, Tensor):
        names, tensors, form = (called,), (wanted,), "tensor"
    elif isinstance(wanted, Mapping):
        by_name = cast("Mapping[str, Tensor]", wanted)
        names, tensors, form = tuple(by_name), tuple(by_name.values()), "dict"
    else:
        form = "list" if isinstance(wanted, list) else "tuple"
        tensors = tuple(wanted)
        names = tuple(f"{called}[{number}]" for number in range(len(tensors)))
    if not tensors:
        raise UsageError(f"{called} is empty", fix="pass a module, tensors by name, or tensors")
    _hold(tensors, names, needs_grad)
    return Variables(tensors, names, form)


def _hold(tensors: Sequence[Tensor], names: Sequence[str], needs_grad: bool) -> None:
    first: dict[int, str] = {}
    for tensor, name in zip(tensors, names, strict=True):
        if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"{name} is a {type(tensor).__name__}, not a tensor")
        if not tensor.dtype.is_floating_point:
            raise UsageError(
                f"{name} is {_dtype(tensor.dtype)}",
                why="complex numbers have no one second derivative: it depends on the convention for conjugates"
                if tensor.dtype.is_complex
                else "only floating point values have derivatives",
                fix="pass torch.view_as_real of it" if tensor.dtype.is_complex else "leave it out",
            )
        if needs_grad and not tensor.requires_grad:
            raise UsageError(
                f"{name} does not require a gradient",
                why="it is frozen, or was never asked to",
                fix="call requires_grad_() before the loss is computed, or leave it out",
            )
        if id(tensor) in first:
            raise UsageError(
                f"{first[id(tensor)]} and {name} are one tensor",
                why="a vector would have two values for each of its elements",
                fix="name tied parameters once, as model.named_parameters() does",
            )
        first[id(tensor)] = name
        if tensor.device != tensors[0].device:
            raise UsageError(
                f"{name} is on {tensor.device}, {names[0]} on {tensors[0].device}",
                fix="ask for the derivatives of one device at a time",
            )


def _like(value: object, like: Tensor, called: str, *, shaped: bool = True) -> Tensor:
    if not isinstance(value, Tensor):
        raise UsageError(f"{called} is a {type(value).__name__}, not a tensor")
    if shaped and value.shape != like.shape:
        raise UsageError(f"{called} has shape {list(value.shape)}, not {list(like.shape)}", fix=_SHAPES)
    if value.dtype != like.dtype:
        raise UsageError(
            f"{called} is {_dtype(value.dtype)}, not {_dtype(like.dtype)}",
            fix=f"convert it: {called}.to({like.dtype})",
        )
    if value.device != like.device:
        raise UsageError(
            f"{called} is on {value.device}, not on {like.device}", fix=f"move it: {called}.to({str(like.device)!r})"
        )
    return value.detach()


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(itertools.islice(names, 4))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
