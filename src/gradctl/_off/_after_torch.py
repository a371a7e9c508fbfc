"""Switches off in this process as soon as torch is there, and does not make torch be there."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def switch_off_after_torch() -> None:
    """Switch off for good: now if torch has been imported, else when it has."""
    if "torch" in sys.modules:
        _switch_off()
    elif not any(isinstance(finder, _WaitForTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForTorch())


def _switch_off() -> None:
    from gradctl._off import start_from_environment

    start_from_environment()


class _WaitForTorch(importlib.abc.MetaPathFinder):
    """A finder that knows one name, `torch`, and wraps the loader that the other finders find for it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of torch as the other finders make it; None for every other name."""
        if fullname != "torch":
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:  # one before us may be asking us
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenSwitchOff(spec.loader, self)
                return spec
        return None


class _ThenSwitchOff(importlib.abc.Loader):
    """Loads torch as its own loader does, then switches off."""

    def __init__(self, loader: Any, finder: _WaitForTorch) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as torch's own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run torch, which sees its own loader, then switch off."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _switch_off()
