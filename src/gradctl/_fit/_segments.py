"""Where a model is cut: the modules whose calls begin and end a segment."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch.nn import Module, ModuleDict, ModuleList, Sequential


def segment_modules(model: Module) -> dict[str, Module]:
    """Return the modules, by FQN, whose calls are segments of their own.

    They are the members of the outermost lists of modules (the blocks of a transformer, the stages of a U-Net), and
    beside those the other modules that hold parameters; a model without lists is cut into its children.
    """
    found: dict[str, Module] = {}
    _collect(model, "", found)
    if not found:
        found = {name: child for name, child in model.named_children() if _has_parameters(child)}
    return found


def _collect(module: Module, prefix: str, found: dict[str, Module]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        members = [(key, member) for key, member in child.named_children() if _has_parameters(member)]
        if isinstance(child, (ModuleList, ModuleDict)) or (
            isinstance(child, Sequential) and any(_has_children(member) for _, member in members)
        ):
            for key, member in members:
                if isinstance(member, (ModuleList, ModuleDict)):
                    _collect(child, f"{path}.", found)
                    break
                found[f"{path}.{key}"] = member
        elif _holds_list(child):
            _collect(child, f"{path}.", found)
        elif isinstance(child, Sequential) and members:
            found[path] = child


def _holds_list(module: Module) -> bool:
    return any(isinstance(child, (ModuleList, ModuleDict)) for child in module.modules() if child is not module)


def _has_children(module: Module) -> bool:
    return next(module.children(), None) is not None


def _has_parameters(module: Module) -> bool:
    return next(module.parameters(), None) is not None


@contextmanager
def cutting(modules: dict[str, Module], cut: Callable[[str], None]) -> Generator[None]:
    """Call `cut` before and after each call of these modules; the name of the module, or nothing after it."""
    handles = [module.register_forward_pre_hook(lambda *_, name=name: cut(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(lambda *_: cut("")) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
