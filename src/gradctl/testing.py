"""Assertions for the tests of your own models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Module

from gradctl._errors import UsageError
from gradctl._explain import check, examine
from gradctl._results import Finding

__all__ = ["assert_gradients_flow"]

_WORDS = {"none": "no gradient", "zero": "a gradient of zero", "nonfinite": "a gradient that is not finite"}
_SHOWN = 8


def assert_gradients_flow(step: Callable[[], Any], model: Module, *, except_: Sequence[str] = ()) -> None:
    """Assert that one training step gives every parameter of a model a gradient, finite and not zero.

    The step is called once, traced; what it does itself (backward, an optimizer step) it does. Where it only returns
    its loss, backward is run on it and every `.grad` is left as it was found. Parameters that require no gradient are
    not asked for one. A parameter whose gradient is zero by design at the start (behind a gate that begins at zero)
    belongs into `except_`.

    Args:
        step: a function without arguments that returns the loss (shape []) or calls backward itself.
        model: its parameters are looked at.
        except_: FQNs, or patterns as `encoder.*`, of parameters that may go without.

    Raises:
        AssertionError: a parameter got none; says which, with the explanation that `gradctl.explain` gives.
        UsageError: an argument does not fit, a pattern matches no parameter, or the model requires no gradient at all.
    """
    check(model, None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("no parameter of the model requires a gradient", fix="leave some of them trainable")
    names = [name for name, _ in model.named_parameters()]
    patterns = [except_] if isinstance(except_, str) else list(except_)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"except_ names {pattern!r}, which is no parameter of the model",
                fix="give FQNs or patterns as named_parameters() spells them, for example 'encoder.*'",
            )
    examined = examine(step, model, None, calls=1)

    def asked(name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in patterns)

    findings = [f for f in examined.findings if _concerns(f, asked)]
    bad: dict[str, list[str]] = {}
    for name, state in examined.states.items():
        if state != "ok" and asked(name):
            bad.setdefault(state, []).append(name)
    errors = [f for f in findings if f.severity == "error"]
    if not bad and not errors:
        return
    total = sum(1 for name in examined.states if asked(name))
    lines = [
        f"{len(found)} of {total} parameters got {_WORDS[state]}: {_listed(found)}" for state, found in bad.items()
    ]
    examined.findings[:] = findings
    explanation = str(examined.findings) if findings else "the cause was not found; `gradctl.explain` shows the facts"
    raise AssertionError("\n".join([*(lines or ["gradients do not flow"]), "", explanation]))


def _concerns(finding: Finding, asked: Callable[[str], bool]) -> bool:
    return finding.severity != "note" and (not finding.parameters or any(asked(name) for name in finding.parameters))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
