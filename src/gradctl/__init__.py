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
    "BadVjp",
    "BrokenGradients",
    "BudgetTooSmall",
    "Finding",
    "Findings",
    "FreezeRefused",
    "GGNOperator",
    "GradctlError",
    "HessianOperator",
    "JacobianOperator",
    "Journal",
    "MemoryReport",
    "NoSecondDerivative",
    "NonFiniteGradient",
    "NotPerSample",
    "PatternMatchesNothing",
    "Plan",
    "PlanMismatch",
    "PlanNotFollowed",
    "PrecisionRefused",
    "RunDirectoryError",
    "StaleSource",
    "Step",
    "SwitchFailed",
    "TornStep",
    "TornStepWarning",
    "UnfinishedStep",
    "UnknownPolicyKey",
    "UsageError",
    "WrongGradient",
    "__version__",
    "backward_with",
    "callbacks",
    "check",
    "clip",
    "custom_vjp",
    "explain",
    "fit",
    "freeze",
    "ggnvp",
    "gradient_noise_scale",
    "gradient_penalty",
    "hessian_diagonal",
    "hvp",
    "is_off",
    "jacobian",
    "jvp",
    "memory",
    "off",
    "per_sample_grads",
    "per_sample_norms",
    "precision",
    "recompute",
    "record",
    "replace",
    "reverse",
    "scale",
    "sharpness",
    "stop",
    "straight_through",
    "testing",
    "trainable",
    "unfreeze",
    "unfreeze_by_step",
    "unrolled",
    "vjp",
    "watch",
]

if TYPE_CHECKING:
    from gradctl import callbacks, testing
    from gradctl._check import check
    from gradctl._custom_grad import backward_with, clip, custom_vjp, replace, reverse, scale, stop, straight_through
    from gradctl._derivatives import (
        GGNOperator,
        HessianOperator,
        JacobianOperator,
        ggnvp,
        gradient_noise_scale,
        gradient_penalty,
        hessian_diagonal,
        hvp,
        jacobian,
        jvp,
        per_sample_grads,
        per_sample_norms,
        sharpness,
        unrolled,
        vjp,
    )
    from gradctl._errors import (
        BackwardRefused,
        BadJournal,
        BadVjp,
        BrokenGradients,
        BudgetTooSmall,
        FreezeRefused,
        GradctlError,
        NonFiniteGradient,
        NoSecondDerivative,
        NotPerSample,
        PatternMatchesNothing,
        PlanMismatch,
        PrecisionRefused,
        RunDirectoryError,
        StaleSource,
        SwitchFailed,
        TornStep,
        TornStepWarning,
        UnfinishedStep,
        UnknownPolicyKey,
        UsageError,
        WrongGradient,
    )
    from gradctl._explain import explain, watch
    from gradctl._fit import MemoryReport, Plan, PlanNotFollowed, fit, memory
    from gradctl._freeze import freeze, trainable, unfreeze, unfreeze_by_step
    from gradctl._journal import Journal
    from gradctl._off import is_off, off
    from gradctl._precision import precision
    from gradctl._recompute import recompute
    from gradctl._results import Finding, Findings
    from gradctl._run import record
    from gradctl._step import Step
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
        "MemoryReport": "_fit",
        "memory": "_fit",
        "fit": "_fit",
        "Plan": "_fit",
        "PlanNotFollowed": "_fit",
        "recompute": "_recompute",
        "freeze": "_freeze",
        "unfreeze": "_freeze",
        "unfreeze_by_step": "_freeze",
        "trainable": "_freeze",
        "stop": "_custom_grad",
        "scale": "_custom_grad",
        "reverse": "_custom_grad",
        "clip": "_custom_grad",
        "straight_through": "_custom_grad",
        "replace": "_custom_grad",
        "custom_vjp": "_custom_grad",
        "backward_with": "_custom_grad",
        "hvp": "_derivatives",
        "ggnvp": "_derivatives",
        "jvp": "_derivatives",
        "vjp": "_derivatives",
        "jacobian": "_derivatives",
        "hessian_diagonal": "_derivatives",
        "per_sample_grads": "_derivatives",
        "per_sample_norms": "_derivatives",
        "gradient_penalty": "_derivatives",
        "unrolled": "_derivatives",
        "sharpness": "_derivatives",
        "gradient_noise_scale": "_derivatives",
        "HessianOperator": "_derivatives",
        "GGNOperator": "_derivatives",
        "JacobianOperator": "_derivatives",
        "check": "_check",
        "precision": "_precision",
        "Step": "_step",
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
