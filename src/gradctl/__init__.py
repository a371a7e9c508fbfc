"""Control, explain and prove what gradients do in a PyTorch program.

Importing this package does nothing and imports no torch: each public name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

# The one list of public names: a test holds it against the documentation.
__all__ = [
    "BackwardRefused",
    "BadJournal",
    "BrokenGradients",
    "Finding",
    "Findings",
    "GradctlError",
    "Journal",
    "NonFiniteGradient",
    "RunDirectoryError",
    "SwitchFailed",
    "TornStep",
    "TornStepWarning",
    "UnknownPolicyKey",
    "UsageError",
    "__version__",
    "callbacks",
    "explain",
    "is_off",
    "off",
    "record",
    "testing",
    "watch",
]

if TYPE_CHECKING:
    from gradctl import callbacks, testing
    from gradctl._errors import (
        BackwardRefused,
        BadJournal,
        BrokenGradients,
        GradctlError,
        NonFiniteGradient,
        RunDirectoryError,
        SwitchFailed,
        TornStep,
        TornStepWarning,
        UnknownPolicyKey,
        UsageError,
    )
    from gradctl._explain import explain, watch
    from gradctl._journal import Journal
    from gradctl._off import is_off, off
    from gradctl._results import Finding, Findings
    from gradctl._run import record
else:
    _HOMES = {
        "Finding": "_results",
        "Findings": "_results",
        "explain": "_explain",
        "watch": "_explain",
        "Journal": "_journal",
        "is_off": "_off",
        "off": "_off",
        "record": "_run",
    }

    _MODULES = ("callbacks", "testing")

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'gradctl' has no attribute {name!r}")
        import importlib

        if name in _MODULES:
            return importlib.import_module(f"gradctl.{name}")
        found = getattr(importlib.import_module(f"gradctl.{_HOMES.get(name, '_errors')}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted(__all__)
