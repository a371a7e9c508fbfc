"""Symptoms: what is seen going wrong before anybody knows why, and which causes can explain each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradctl._results import Finding

CERTAIN = 0.8
"""The least confidence of a finding that ends the search for a cause."""
HARMLESS = frozenset({"left_autograd", "frozen", "overwritten"})
"""Symptoms that are none by themselves: a program may well mean what was seen."""

_CUTS = frozenset(
    [
        "argmax",
        "checkpoint_no_grad_input",
        "comparison",
        "custom_function_none",
        "data",
        "detach",
        "forced_requires_grad",
        "frozen_params",
        "grad_mode_left_off",
        "inference_mode",
        "int_cast",
        "item",
        "missing_create_graph",
        "no_grad",
        "non_leaf_grad",
        "non_reparam_sample",
        "numpy_roundtrip",
        "param_rebound",
        "parameter_wrap",
        "rewrap_tensor",
        "unused_output",
        "unused_param",
        "not_a_parameter",
        "unregistered_module",
        "param_not_in_optimizer",
        "input_not_in_graph",
        "grad_cleared",
        "zero_grad_misplaced",
    ]
)
_BY_KIND: dict[str, frozenset[str]] = {
    "none": _CUTS,
    "lost": _CUTS,
    "cleared": frozenset({"zero_grad_misplaced", "grad_cleared", "grad_overwritten"}),
    "not_in_optimizer": frozenset(
        {"param_not_in_optimizer", "unregistered_module", "not_a_parameter", "empty_optimizer", "param_rebound"}
    ),
    "replaced": frozenset({"param_not_in_optimizer", "unused_param", "unregistered_module", "param_rebound"}),
    "uncleared": frozenset({"missing_zero_grad"}),
    "live_graphs": frozenset({"history_kept", "stale_graph_carried"}),
}
_SMALL = ("zero_grad_", "vanished_", "custom_function_")
_LARGE = ("nan_", "nonfinite", "exploded_")
_BY_STEM = {"zero": _SMALL, "vanished": _SMALL, "nonfinite": _LARGE, "exploded": _LARGE}


@dataclass(frozen=True, slots=True)
class Symptom:
    """Something that was seen going wrong.

    Args:
        kind: `grad_error` (torch refused), `none` (never a gradient), `lost` (no gradient any more), `zero`,
            `nonfinite`, `not_in_optimizer`, `replaced`, `uncleared`, `cleared`, `live_graphs`, `left_autograd`,
            `vanished`, `exploded` (a norm far from what it was),
            `frozen` (held by an optimizer, and frozen), `overwritten` (the program writes `.grad` itself).
        text: the same in words, with a number.
        step: at which optimizer step it began, counted from 1; None where that is not known.
        parameters: FQNs of the parameters concerned, as far as anything names them.
    """

    kind: str
    text: str
    step: int | None = None
    parameters: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the symptom as a plain mapping."""
        return {"kind": self.kind, "text": self.text, "step": self.step, "parameters": list(self.parameters)}


def explained(symptom: Mapping[str, Any], findings: Sequence[Finding]) -> bool:
    """Say whether findings explain a symptom: surely enough, of a cause that does this, for every parameter it names.

    Args:
        symptom: as `Symptom.to_json` returns it.
        findings: what has been found.
    """
    kind = symptom["kind"]
    fitting = [f for f in findings if f.confidence >= CERTAIN and f.severity != "note" and _can_cause(kind, f.slug)]
    if not fitting:
        return False
    wanted = set(symptom.get("parameters") or ())
    # A finding without names may still be about all of them: names are looked for, not always found.
    return not wanted or any(not f.parameters for f in fitting) or wanted <= {n for f in fitting for n in f.parameters}


def _can_cause(kind: str, slug: str) -> bool:
    return slug in _BY_KIND.get(kind, ()) or slug.startswith(_BY_STEM.get(kind, ("?",)))
