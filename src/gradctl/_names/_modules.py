"""Reading modules without running them: who holds whom, and the clean names of what they hold."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

_WRAPPER_PARTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(slots=True)
class Tree:
    """An outermost module with the clean names of its parameters, by `id`.

    Args:
        root: the module.
        names: the first name of each parameter.
        params: the parameters in the order of `named_parameters`.
        aliases: the further names of tied parameters.
        registered: whether the registration hooks told of it.
        gives: the ids whose names are taken from this tree.
    """

    root: Module
    names: dict[int, str]
    params: list[Tensor]
    aliases: dict[int, tuple[str, ...]]
    registered: bool
    gives: list[int] = field(default_factory=list[int])


def own_attributes(holder: object) -> dict[str, Any]:
    """Return the instance dictionary, past any `__getattr__` of the class; empty where there is none."""
    try:
        found: Any = object.__getattribute__(holder, "__dict__")
    except AttributeError:
        return {}
    return found if type(found) is dict else {}


def is_parameter(tensor: Tensor) -> bool:
    """Whether `tensor` is an `nn.Parameter`, also one that keeps its own class, as a DTensor does."""
    return Parameter in type(tensor).__mro__ or own_attributes(tensor).get("_is_param") is True


def outermost(candidates: list[Module], missing: set[int]) -> tuple[list[Module], list[Module]]:
    """Return the outermost modules: those above a parameter that is looked for, and the others.

    Args:
        candidates: distinct modules.
        missing: ids of the parameters that are looked for.
    """
    parents: dict[int, list[Module]] = {}
    for module in candidates:
        for _, child in _children(module):
            parents.setdefault(id(child), []).append(module)
    holders = [m for m in candidates if not missing.isdisjoint(id(param) for _, param in _own_parameters(m))]
    above: dict[int, Module] = {}
    stack = list(holders)
    while stack:
        module = stack.pop()
        if id(module) not in above:
            above[id(module)] = module
            stack.extend(parents.get(id(module), ()))
    holding = [module for key, module in above.items() if key not in parents]
    below = {id(module) for root in holding for _, module in modules_of(root)}
    for module in holders:
        if id(module) not in below:
            # Modules that hold each other have no outermost one: the one that closes the ring stands for it.
            top, climbed = module, {id(module)}
            while id(parents[id(top)][0]) not in climbed:
                top = parents[id(top)][0]
                climbed.add(id(top))
            holding.append(top)
            below.update(id(inner) for _, inner in modules_of(top))
    return holding, [m for m in candidates if id(m) not in parents and id(m) not in above]


def tree_of(root: Module, *, registered: bool) -> Tree:
    """Read the parameters of `root` in the order of `named_parameters`, without calling it."""
    names: dict[int, str] = {}
    aliases: dict[int, tuple[str, ...]] = {}
    params: list[Tensor] = []
    for path, module in modules_of(root):
        for name, param in _own_parameters(module):
            clean = f"{path}.{name}" if path else name
            if id(param) in names:
                aliases[id(param)] = (*aliases.get(id(param), ()), clean)
            else:
                names[id(param)] = clean
                params.append(param)
    return Tree(root, names, params, aliases, registered)


def modules_of(root: Module) -> Iterator[tuple[str, Module]]:
    """Yield the clean FQN of every module below `root`, itself first as "", in the order of `named_modules`."""
    wrapper = _wrapper_prefix(root)
    visited: set[int] = set()
    stack: list[tuple[str, Module]] = [("", root)]
    while stack:
        path, module = stack.pop()
        if id(module) in visited:
            continue
        visited.add(id(module))
        clean = f"{path}.".removeprefix(wrapper)
        for part in _WRAPPER_PARTS:
            clean = clean.replace(part, "")
        yield clean.strip("."), module
        stack.extend((f"{path}.{name}" if path else name, child) for name, child in reversed(_children(module)))


def class_name(root: Module) -> str:
    """Return the class name of a model as its author wrote it, below DDP, `torch.compile` and `fully_shard`."""
    for _ in filter(None, _wrapper_prefix(root).split(".")):
        root = _children(root)[0][1]
    kinds: Any = type(root).__mro__
    # fully_shard swaps the class for one of its own, which derives from FSDPModule and the author's class.
    return str(kinds[2 if kinds[1].__name__ == "FSDPModule" else 0].__name__)


def all_modules() -> list[Module]:
    """Return every live module that the garbage collector tracks: not those hidden by `gc.freeze()`."""
    kinds: set[int] = set()
    stack: list[type] = [Module]
    while stack:
        kind = stack.pop()
        if id(kind) not in kinds:
            kinds.add(id(kind))
            stack.extend(type.__subclasses__(kind))
    # Not isinstance: a lazy proxy would import what it stands for.
    return [thing for thing in gc.get_objects() if id(type(thing)) in kinds]


def _children(module: Module) -> list[tuple[str, Module]]:
    table = own_attributes(module).get("_modules") or {}
    return [(name, child) for name, child in list(table.items()) if child is not None]


def _own_parameters(module: Module) -> list[tuple[str, Tensor]]:
    table = own_attributes(module).get("_parameters") or {}
    return [(name, param) for name, param in list(table.items()) if param is not None]


def _wrapper_prefix(root: Module) -> str:
    """The part of the names that DDP, DataParallel and the like put before the names of the model they wrap."""
    prefix, seen = "", {id(root)}
    while True:
        children = _children(root)
        if len(children) != 1 or _own_parameters(root):
            return prefix
        ((name, child),) = children
        if name not in ("module", "_orig_mod") or id(child) in seen:
            return prefix
        seen.add(id(child))
        prefix, root = f"{prefix}{name}.", child
