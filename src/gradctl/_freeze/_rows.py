"""Some rows of a parameter: which, and how they are kept.

A gradient of zero does not keep them: weight decay and momentum move a row whose gradient is zero. So their values, and
those of the optimizer's state, are put back after each step as they were before it, bit for bit; their gradient is zero
besides, so that norms and clipping do not count them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from gradctl._errors import FreezeRefused, UsageError
from gradctl._freeze._layers import Layer
from gradctl._names._modules import own_attributes

# What optimizers begin with is zero, but for these.
_STARTS_OTHERWISE = frozenset({"step_size"})


class Rows:
    """A choice of rows, or of single elements, of one parameter.

    Where they are most rows of many, the few others are what is looked up: copying a whole tensor is the faster.

    Args:
        which: first row and count; sorted indices, int64 [rows]; or a mask, bool, of the parameter's shape.
        others: the rows that are not among them, int64, if these are fewer.
        count: how many elements of the parameter they are.
        text: for messages and tables: `rows 0-9 of 50257`.
    """

    __slots__ = ("_others", "_which", "count", "text")

    def __init__(self, which: tuple[int, int] | Tensor, *, count: int, text: str, others: Tensor | None = None) -> None:
        self._which = which
        self._others = others
        self.count = count
        self.text = text

    def take(self, whole: Tensor) -> Tensor:
        """Return a copy of these rows of `whole` (of all of it, where they are a mask: that needs no wait)."""
        which = self._on(whole)
        if isinstance(which, tuple):
            return whole.narrow(0, *which).clone()
        is_all = which.dtype == torch.bool or self._others is not None
        return whole.clone() if is_all else whole.index_select(0, which)

    def put(self, whole: Tensor, kept: Tensor) -> None:
        """Write back what `take` returned."""
        which = self._on(whole)
        if isinstance(which, tuple):
            whole.narrow(0, *which).copy_(kept)
        elif which.dtype == torch.bool:
            torch.where(which, kept, whole, out=whole)
        elif self._others is not None:
            moved = whole.index_select(0, self._others)
            whole.copy_(kept).index_copy_(0, self._others, moved)
        else:
            whole.index_copy_(0, which, kept)

    def zeroed(self, grad: Tensor) -> Tensor:
        """Return `grad` with zeros in these rows; `grad` itself may be held by others, and is left alone."""
        which = self._on(grad)
        if grad.is_sparse:
            return self._without(grad.coalesce(), which)
        if isinstance(which, tuple):
            zeroed = grad.clone()
            zeroed.narrow(0, *which).zero_()
            return zeroed
        if self._others is not None:
            return torch.zeros_like(grad).index_copy_(0, self._others, grad.index_select(0, self._others))
        return grad.masked_fill(which, 0) if which.dtype == torch.bool else grad.index_fill(0, which, 0)

    def clear(self, whole: Tensor) -> None:
        """Write zeros into these rows."""
        whole.copy_(self.zeroed(whole))

    def _without(self, grad: Tensor, which: tuple[int, int] | Tensor) -> Tensor:
        row = grad.indices()[0]
        if isinstance(which, tuple):
            keep = (row < which[0]) | (row >= sum(which))
        elif which.dtype == torch.bool:
            keep_values = grad.values().masked_fill(which[row], 0)
            return torch.sparse_coo_tensor(
                grad.indices(), keep_values, grad.shape, is_coalesced=True, check_invariants=False
            )
        else:
            keep = ~torch.isin(row, which)
        return torch.sparse_coo_tensor(
            grad.indices()[:, keep], grad.values()[keep], grad.shape, is_coalesced=True, check_invariants=False
        )

    def _on(self, like: Tensor) -> tuple[int, int] | Tensor:
        # A model that was moved takes its rows along.
        if isinstance(self._which, Tensor) and self._which.device != like.device:
            self._which = self._which.to(like.device)
            self._others = None if self._others is None else self._others.to(like.device)
        return self._which


def read_rows(name: str, parameter: Tensor, wanted: Any) -> Rows:
    """Read what a person gives for rows: a number, numbers, a range, a slice, a mask of rows or of elements.

    Raises:
        UsageError: they are no rows of this parameter, none, or all.
        FreezeRefused: the parameter is spread over processes, or not there yet.
    """
    if hasattr(parameter, "full_tensor") or torch.nn.parameter.is_lazy(parameter):
        raise FreezeRefused(
            f"rows of {name}, which is a {type(parameter).__name__}",
            what="they cannot be put back after a step",
            why="each process steps its own shard of it"
            if hasattr(parameter, "full_tensor")
            else "it has no rows yet: its shape comes with the first forward",
            fix=f"freeze it whole: gradctl.freeze(model, {name!r})",
        )
    if not parameter.is_floating_point() and not parameter.is_complex():
        raise UsageError(f"rows of {name}, which is {parameter.dtype}", what="no gradient moves it")
    if parameter.dim() == 0:
        raise UsageError(f"rows of {name}, which is a single number", fix=f"gradctl.freeze(model, {name!r})")
    size, width = parameter.shape[0], parameter[0].numel() if parameter.shape[0] else 0
    if isinstance(wanted, Tensor) and wanted.dtype == torch.bool:
        if wanted.shape == parameter.shape and parameter.dim() > 1:
            count = int(wanted.sum())
            _refuse_none_or_all(name, count, parameter.numel(), "elements")
            mask = wanted.detach().to(parameter.device, copy=True)
            return Rows(mask, count=count, text=f"{count} of {parameter.numel()} elements")
        if wanted.shape != (size,):
            raise UsageError(
                f"the mask for {name} has shape {list(wanted.shape)}",
                what=f"a mask of rows has shape [{size}], one of elements {list(parameter.shape)}",
            )
        indices = wanted.nonzero().flatten().tolist()
    else:
        indices = _indices(name, wanted, size)
    outside = [index for index in indices if not -size <= index < size]
    if outside:
        raise UsageError(
            f"row {outside[0]} of {name}, which has {size} rows", what=f"rows are 0 to {size - 1}, or -{size} to -1"
        )
    rows = sorted({index % size for index in indices})
    _refuse_none_or_all(name, len(rows), size, "rows")
    first, last = rows[0], rows[-1]
    together = last - first + 1 == len(rows)
    which = (first, len(rows)) if together else torch.tensor(rows, device=parameter.device)
    others = None
    if not together and 2 * len(rows) > size:
        chosen = set(rows)
        others = torch.tensor([row for row in range(size) if row not in chosen], device=parameter.device)
    span = f"row {first}" if len(rows) == 1 else f"rows {first}-{last}" if together else f"{len(rows)} rows"
    return Rows(which, count=len(rows) * width, text=f"{span} of {size}", others=others)


def _indices(name: str, wanted: Any, size: int) -> list[int]:
    if isinstance(wanted, slice):
        return list(range(size)[wanted])
    if isinstance(wanted, Tensor):
        wanted = wanted.flatten().tolist() if not wanted.is_floating_point() else [0.5]
    try:
        indices: list[Any] = list(wanted) if isinstance(wanted, Iterable) else [wanted]
        if any(isinstance(index, bool) for index in indices):
            indices = [position for position, chosen in enumerate(_as_mask(indices, size)) if chosen]
        return [index.__index__() for index in indices]
    except (TypeError, AttributeError, ValueError):
        raise UsageError(
            f"rows of {name}: {wanted!r}"[:200],
            what="rows are a number, numbers, a range, a slice, or a mask of booleans",
            fix=f"for example rows={{{name!r}: range(0, 10)}}",
        ) from None


def _as_mask(values: list[Any], size: int) -> list[bool]:
    if len(values) != size or not all(isinstance(value, bool) for value in values):
        raise ValueError
    return values


def _refuse_none_or_all(name: str, count: int, size: int, of: str) -> None:
    if count == 0:
        raise UsageError(f"no {of} of {name}", what="the choice is empty: nothing would be frozen")
    if count == size:
        raise UsageError(f"all {size} {of} of {name}", fix=f"freeze it whole: gradctl.freeze(model, {name!r})")


class Held:
    """Rows that one call holds, with the hook that keeps their gradient at zero."""

    __slots__ = ("_grads", "_hook", "layer", "rows")

    def __init__(self, parameter: Tensor, rows: Rows, layer: Layer) -> None:
        self.rows = rows
        self.layer = layer
        self._grads: tuple[Tensor, Tensor, int] | None = None
        if parameter.grad is not None:
            before, after = parameter.grad, rows.zeroed(parameter.grad)
            parameter.grad = after
            self._grads = (before, after, after._version)
        trains = parameter.requires_grad
        parameter.requires_grad_(True)  # torch hooks nothing else; the hook stays where the flag goes
        try:
            self._hook = parameter.register_hook(rows.zeroed)
        finally:
            parameter.requires_grad_(trains)

    def remove(self, parameter: Tensor) -> None:
        """Let the gradient pass again, and give back the one that stood there, if nothing was added to it since."""
        self._hook.remove()
        if self._grads is not None:
            before, after, version = self._grads
            if parameter.grad is after and after._version == version:
                parameter.grad = before


class Site:
    """Where a parameter with held rows stands, kept weakly: another tensor there has none of them.

    Args:
        name: its FQN.
        module: the module that holds it.
        key: its name there.
        parameter: the parameter.
    """

    __slots__ = ("_key", "_module", "_parameter", "name")

    def __init__(self, name: str, module: Module, key: str, parameter: Tensor) -> None:
        self.name = name
        self._key = key
        self._module = weakref.ref(module)
        self._parameter = weakref.ref(parameter)

    def is_alive(self) -> bool:
        """Whether its module is."""
        return self._module() is not None

    def is_lost(self) -> bool:
        """Whether another tensor stands there, or none and the parameter is dead, while the module lives."""
        module, parameter = self._module(), self._parameter()
        if module is None:
            return False
        current = own_attributes(module).get("_parameters", {}).get(self._key)
        return current is not parameter if current is not None else parameter is None


_held: dict[int, tuple[weakref.ref[Tensor], list[Held]]] = {}
_sites: dict[Layer, list[Site]] = {}


def held_of(parameter: Tensor) -> list[Held]:
    """Return what holds rows of a parameter."""
    entry = _held.get(id(parameter))
    return entry[1] if entry is not None else []


def any_held() -> bool:
    """Whether rows of any parameter are held, or were when their parameter died."""
    return bool(_held) or any(site.is_alive() for sites in list(_sites.values()) for site in sites)


def refuse_lost() -> None:
    """Refuse once, where a parameter was replaced after its rows were frozen: the new one's rows move.

    Raises:
        FreezeRefused: names it.
    """
    for layer, sites in list(_sites.items()):
        _sites[layer] = [site for site in sites if site.is_alive()]
        lost = next((site for site in _sites[layer] if site.is_lost()), None)
        if lost is not None or not _sites[layer]:
            del _sites[layer]
        if lost is not None:
            raise FreezeRefused(
                f"rows of {lost.name} are frozen no longer",
                what=f"another tensor stands in its place since {layer}",
                why="resize_token_embeddings, fully_shard and the like make new parameters",
                fix="freeze rows after them",
            )


def hold(parameter: Tensor, rows: Rows, layer: Layer, *, site: Site, gone: Callable[[], None]) -> None:
    """Keep `rows` until `layer` is released."""
    key = id(parameter)
    _sites.setdefault(layer, []).append(site)
    if key not in _held:
        _held[key] = (weakref.ref(parameter, lambda _: (_held.pop(key, None), gone())), [])
    _held[key][1].append(Held(parameter, rows, layer))


def release(parameter: Tensor, layer: Layer) -> None:
    """Let go of what `layer` holds of a parameter."""
    _sites.pop(layer, None)
    entry = _held.get(id(parameter))
    if entry is None:
        return
    for held in [held for held in entry[1] if held.layer is layer]:
        held.remove(parameter)
        entry[1].remove(held)
    if not entry[1]:
        del _held[id(parameter)]


class Kept:
    """What rows of a parameter and of its optimizer state are before a step, to be put back after it."""

    __slots__ = ("_parameter", "_rows", "_state", "_values")

    def __init__(self, parameter: Tensor, rows: Rows, state: dict[str, Any]) -> None:
        self._parameter = parameter
        self._rows = rows
        self._values = rows.take(parameter.detach())
        self._state = {key: rows.take(value) for key, value in _like(parameter, state)}

    def put_back(self, state: dict[str, Any]) -> None:
        """Put back the values, and the state; state that the step has made begins at zero."""
        self._rows.put(self._parameter.detach(), self._values)
        for key, value in _like(self._parameter, state):
            kept = self._state.get(key)
            if kept is not None:
                self._rows.put(value, kept)
            elif key not in _STARTS_OTHERWISE:
                self._rows.clear(value)


def _like(parameter: Tensor, state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [
        (key, value) for key, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
