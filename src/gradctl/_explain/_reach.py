"""What the graph of a finished loss shows without a trace: which parameters it reaches, and what cannot be used."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradctl._errors import UsageError
from gradctl._explain._held import held_by, largest
from gradctl._explain._passages import walk
from gradctl._lineage import Stack, site
from gradctl._lineage._tracer import grad_fn_of
from gradctl._names import NameBook
from gradctl._results import Finding, Findings, Span

_CALLABLE = (
    "a graph shows what a loss reaches, not the line that cut it: pass explain() a function that computes the loss"
)


def of_graph(loss: Tensor, model: Module | None, optimizer: Optimizer | None, stack: Stack, folder: str) -> Findings:
    """Return what the graph of a loss shows.

    Args:
        loss: the tensor.
        model: whose parameters it should reach.
        optimizer: whose parameters it should reach.
        stack: the user's frames, innermost first.
        folder: places below it are written relative to it.

    Raises:
        UsageError: the loss reaches other leaves and none of the model's.
    """
    primary = _span(stack, folder) if stack else None
    found: list[Finding] = []
    with torch._C.DisableTorchFunction(), torch.no_grad():
        function = grad_fn_of(loss)
        leaves = walk([function])[0] if function is not None else [loss] if loss.requires_grad else []
        wanted = _wanted(model, optimizer)
        names = _names(list(wanted.values()), model)
        reached = {id(leaf) for leaf in leaves}
        if not leaves:
            found.append(_without_history(loss))
        elif wanted and not reached & set(wanted):
            raise UsageError(
                f"this loss reaches none of the {len(wanted)} parameters of the {_kind(model, optimizer)}",
                what=f"it reaches {len(leaves)} other {'leaf' if len(leaves) == 1 else 'leaves'}",
                why="it was computed with another model, or the model's output is cut from it",
                fix="pass the model that computed this loss, or a function that computes it",
            )
        else:
            missing = [key for key, p in wanted.items() if key not in reached and p.requires_grad]
            if missing:
                found.append(_unreached(missing, len(wanted), names))
        if loss.numel() != 1:
            found.append(_not_scalar(loss, primary))
        found += _bad_numbers(loss, primary)
        if optimizer is not None and model is not None:
            held = {id(p) for p in held_by(optimizer)}
            free = [id(p) for p in model.parameters() if id(p) in reached and id(p) not in held]
            if free:
                found.append(_not_held(free, names, primary))
    return Findings(found, remarks=(_CALLABLE,), folder=folder, subject="this loss")


def _span(stack: Stack, folder: str) -> Span:
    here = site(stack[0])
    below = folder.rstrip(os.sep) + os.sep
    return Span(here.file.removeprefix(below), here.line)


def _wanted(model: Module | None, optimizer: Optimizer | None) -> dict[int, Tensor]:
    params = [*(model.parameters() if model is not None else ())]
    params += held_by(optimizer) if optimizer is not None else []
    return {id(p): p for p in params}


def _kind(model: Module | None, optimizer: Optimizer | None) -> str:
    return f"model ({type(model).__name__})" if model is not None else f"optimizer ({type(optimizer).__name__})"


def _names(params: list[Tensor], model: Module | None) -> dict[int, str]:
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    unnamed = [p for p in params if id(p) not in names]
    if unnamed:
        book = NameBook()
        try:
            found = book.names_for(unnamed).names
        finally:
            book.stop()
        names |= {id(p): name for p, name in zip(unnamed, found, strict=True) if name is not None}
    return names


def _named(keys: Sequence[int], names: dict[int, str]) -> tuple[str, ...]:
    return tuple(sorted({name for key in keys if (name := names.get(key)) is not None}))


def _without_history(loss: Tensor) -> Finding:
    return Finding(
        slug="unknown",
        severity="error",
        symptom=f"this tensor (shape {list(loss.shape)}) has no history: backward() cannot begin here",
        why="it was computed without gradients, or cut from its inputs on the way; the tensor does not show where",
        fix="gradctl.explain(lambda: compute_the_loss(), model=model) names the line",
    )


def _unreached(missing: list[int], total: int, names: dict[int, str]) -> Finding:
    return Finding(
        slug="unknown",
        severity="warning",
        symptom=f"{len(missing)} of {total} parameters are not in the graph of this loss: they get no gradient from it",
        why="they are not used for it, or their values reach it without their history; the graph does not show which",
        fix="gradctl.explain(lambda: compute_the_loss(), model=model) names the line",
        parameters=_named(missing, names),
    )


def _not_scalar(loss: Tensor, primary: Span | None) -> Finding:
    return Finding(
        slug="non_scalar_loss",
        severity="error",
        symptom=f"the loss has shape {list(loss.shape)}: backward() needs one number",
        why="a gradient is that of a single number; this tensor was not reduced",
        fix="reduce the loss: loss.mean().backward()",
        primary=primary,
    )


def _bad_numbers(loss: Tensor, primary: Span | None) -> list[Finding]:
    size = largest([loss])[0]
    if size is None or size - size == 0.0:
        return []
    why = "every gradient of it is NaN or zero; the value alone does not show which operation made it so"
    fix = "gradctl.explain(lambda: compute_the_loss(), model=model) names the operation"
    symptom = f"the loss is {'NaN' if size != size else 'infinite'}"
    return [Finding("nonfinite", "error", symptom, why, fix, primary=primary)]


def _not_held(free: list[int], names: dict[int, str], primary: Span | None) -> Finding:
    return Finding(
        slug="param_not_in_optimizer",
        severity="warning",
        symptom=f"{len(free)} {'parameter' if len(free) == 1 else 'parameters'} of the model that this loss reaches "
        f"{'is' if len(free) == 1 else 'are'} not held by the optimizer",
        why="a gradient that no optimizer uses trains nothing",
        fix="build the optimizer from all of them: torch.optim.SGD(model.parameters(), ...)",
        primary=primary,
        parameters=_named(free, names),
    )
