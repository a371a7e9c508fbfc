"""Errors about what is no tensor: a loss that is a number, a gradient that is None, an optimizer without parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch

from gradctl._explain._context import Candidate, Context, place
from gradctl._explain._literal import returned_number
from gradctl._explain._provenance import number_source
from gradctl._explain._raised import Raised, raised, value_in
from gradctl._explain._source import attribute_line, definitions, source_of
from gradctl._explain.rules import Rule
from gradctl._lineage import Escape, Site, site


def loss_not_tensor(context: Context) -> Iterable[Candidate]:
    """`backward()` of a number: which line made it a number."""
    error = raised(context, "object has no attribute 'backward'")
    if error is None or error.here is None or not isinstance(error.error, AttributeError):
        return
    number: Any = getattr(error.error, "obj", None)
    kind = type(number).__name__
    escape = _escape(context, error, number)
    where: Site | None = None
    if escape is not None:
        where = place(escape.stack)
        why = f"`.{escape.kind.strip('_')}()` turned the tensor into a plain number here, which has no history"
        confidence = 0.95
    else:
        found = returned_number(error, number)
        where = found[0] if found is not None else None
        why = found[1] if found is not None else "something that is no tensor was returned"
        confidence = 0.93
    yield Candidate(
        "loss_not_tensor",
        where or error.here,
        f"backward() was called on a {kind}, not on a tensor: {number!r}"[:200],
        why,
        confidence=(confidence if where is not None else 0.6) * error.certainty,
        evidence=((error.here, "backward"), *error.callers),
        node=escape.node if escape is not None else None,
        explains="error",
    )


def _escape(context: Context, error: Raised, number: Any) -> Escape | None:
    escapes = list(context.facts.escapes)
    for escape in reversed(escapes):
        if escape.result is number and isinstance(number, float):
            return escape
    if isinstance(number, int) and not isinstance(number, bool) and number == 0:
        return None
    for entry in error.stack[:3]:
        found = number_source(entry, escapes)
        if found is not None:
            return found
    return None


def none_gradient(context: Context) -> Iterable[Candidate]:
    """Arithmetic with a gradient that is None: the name stands for another tensor than the one that trains."""
    error = raised(context, "'NoneType'")
    read = context.facts.none_read
    if error is None or read is None or error.here is None or not isinstance(error.error, (TypeError, AttributeError)):
        return
    node, is_leaf, stack = read
    if (
        not stack
        or not error.stack
        or stack[0][0] is not error.stack[0][0]
        or abs(site(stack[0]).line - error.here.line) > 3
    ):
        return
    if is_leaf or not node.stack:
        return
    rebound = node.generation > 0
    word = node.op.strip("_")
    yield Candidate(
        "param_rebound" if rebound else "non_leaf_grad",
        node.site,
        "the gradient is None: the name stands for a computed tensor, not for the leaf that backward() fills",
        f"the assignment here gave the name to the result of `{word}`; only leaves keep a gradient",
        confidence=0.93 * error.certainty,
        evidence=((error.here, "read"),),
        node=node,
        explains="error",
    )


def empty_optimizer(context: Context) -> Iterable[Candidate]:
    """An optimizer got no parameters: where the layers are kept, or why none is left."""
    error = raised(context, "optimizer got an empty parameter list")
    if error is None or error.here is None or error.frame is None:
        return
    found = _why_empty(context, error, error.frame)
    where, why = found if found is not None else (error.here, "what it was given yields no parameters")
    yield Candidate(
        "empty_optimizer",
        where or error.here,
        "the optimizer got no parameters",
        why,
        confidence=(0.93 if found is not None else 0.8) * error.certainty,
        evidence=((error.here, "optimizer made"),),
        explains="error",
    )


def _why_empty(context: Context, error: Raised, frame: FrameType) -> tuple[Site | None, str] | None:
    source = source_of(error.stack[0])
    statement = source.statement(error.stack[0]) if source is not None else None
    if source is None or statement is None:
        return None
    modules: list[Any] = []
    for part in ast.walk(statement):
        if isinstance(part, (ast.Name, ast.Attribute)):
            try:
                value = value_in(frame, part)
            except LookupError:
                continue
            if isinstance(value, torch.nn.Module):
                modules.append(value)
            elif type(value).__name__ == "generator" and isinstance(part, ast.Name):
                defined = definitions(source, part.id, statement)
                if defined:
                    where = site(error.stack[0])._replace(line=defined[0].lineno)
                    return where, f"`{part.id}` is a generator, which can be walked through once only, and has been"
    for module in modules:
        hidden = _hidden_in(module)
        if hidden is not None:
            return hidden
        ids = {id(parameter) for parameter in module.parameters()}
        frozen = [event for event in context.facts.flags if event.tensor_id in ids and not event.to]
        if frozen and not any(parameter.requires_grad for parameter in module.parameters()):
            return place(
                frozen[-1].stack
            ), "every parameter was frozen here, and only those that require a gradient are taken"
    return None


def _hidden_in(module: Any) -> tuple[Site | None, str] | None:
    """Return the line at which a module keeps layers in a plain list or dictionary."""
    for part in module.modules():
        for name, value in vars(part).items():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if name.startswith("_") and name in ("_modules", "_parameters", "_buffers"):
                continue
            if any(isinstance(item, (torch.nn.Module, torch.nn.Parameter)) for item in parts):
                where = attribute_line(type(part), name)
                kind = type(value).__name__
                return where, f"`self.{name}` is a plain {kind}, whose layers nobody registers: nn.ModuleList sees them"
    return None


RULES: list[Rule] = [loss_not_tensor, none_gradient, empty_optimizer]
