"""Callbacks for training frameworks; importing this imports none of them.

`ExplainTransformers` is for `transformers.Trainer`, `ExplainLightning` for Lightning: each traces the first steps of a
training and says what is wrong with its gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["ExplainLightning", "ExplainTransformers"]

if TYPE_CHECKING:
    from gradctl._integrations._lightning import ExplainLightning
    from gradctl._integrations._transformers import ExplainTransformers
else:
    _HOMES = {"ExplainLightning": "_lightning", "ExplainTransformers": "_transformers"}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'gradctl.callbacks' has no attribute {name!r}")
        import importlib

        found = getattr(importlib.import_module(f"gradctl._integrations.{_HOMES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted(__all__)
