"""The frozen part of a model: the modules whose parameters are all frozen, and what lies in them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import Module

from gradctl._names._modules import _children, _own_parameters

_RUNNING = frozenset({"running_mean", "running_var"})  # BatchNorm, SyncBatchNorm, InstanceNorm and those like them
_POWER_ITERATION = (("_u", "_v"), ("weight_u", "weight_v"))  # both forms of spectral norm move their weight with these


def frozen_part(model: Module, is_chosen: Callable[[Tensor], bool]) -> list[Module]:
    """Return the modules of the frozen part, outer ones first.

    A module belongs to it if no parameter at or below it requires a gradient and one of them is chosen, and so does
    everything below such a module: also what has no parameters, as a dropout.

    Args:
        model: where to look.
        is_chosen: whether this is about a parameter.
    """
    part: dict[int, Module] = {}
    _look(model, is_chosen, {}, part)
    return list(part.values())


def _look(
    module: Module,
    is_chosen: Callable[[Tensor], bool],
    seen: dict[int, tuple[bool, bool]],
    part: dict[int, Module],
) -> tuple[bool, bool]:
    """Return whether it, with all below, requires no gradient, and whether a chosen one is there."""
    if id(module) in seen:
        return seen[id(module)]
    seen[id(module)] = (True, False)  # for a module that holds itself
    own = [parameter for _, parameter in _own_parameters(module)]
    still = not any(parameter.requires_grad for parameter in own)
    has_chosen = any(is_chosen(parameter) for parameter in own)
    for _, child in _children(module):
        child_still, child_has = _look(child, is_chosen, seen, part)
        still, has_chosen = still and child_still, has_chosen or child_has
    seen[id(module)] = (still, has_chosen)
    if still and has_chosen:
        part.update((id(below), below) for below in module.modules() if id(below) not in part)
    return seen[id(module)]


def keeps_statistics(module: Module) -> bool:
    """Whether a forward in training mode moves the module's own statistics."""
    own = {name for name, _ in module.named_buffers(recurse=False)}  # without those that are None
    return bool(own & _RUNNING) or any(own.issuperset(pair) for pair in _POWER_ITERATION)
