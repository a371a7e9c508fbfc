"""grad_overwritten in a hook: what `register_hook` of a leaf returned in its gradient's place is zero."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from types import CodeType

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain._source import parsed, statements
from gradctl._lineage import HookFacts, Site, is_own

_TWICE = 2


def grad_overwritten_in_hook(context: Context) -> Iterable[Candidate]:
    """Find hooks of parameters that turn the gradient that arrives into zeros."""
    hooks = {hook.tensor_id: hook for hook in context.facts.hooks if not hook.after}
    grouped: dict[Site, list[tuple[int, HookFacts]]] = {}
    for key, (optimizer, at) in context.facts.zeroed_by_hook.items():
        hook = hooks.get(key)
        if hook is None or hook.code is None or is_own(hook.code.co_filename):
            continue
        if len(at) < _TWICE or at[-1] < optimizer.steps - 1:
            continue
        if 2 * len(at) >= optimizer.steps - at[0]:
            grouped.setdefault(_returning_line(hook.code), []).append((key, hook))
    for line, found in grouped.items():
        keys = tuple(sorted(key for key, _ in found))
        optimizer, at = context.facts.zeroed_by_hook[keys[0]]
        yield Candidate(
            "grad_overwritten",
            line,
            f"{count(len(at), 'step')} of {optimizer.name} used zeros for {count(len(keys), 'parameter')} at which a "
            "gradient had arrived",
            "a hook of the parameter returns zeros in the gradient's place",
            fix="return None from the hook to leave the gradient as it is",
            confidence=0.93,
            evidence=((place(found[0][1].stack), "hook registered"), (place(optimizer.last_step_stack), "step")),
            parameters=keys,
            explains="zero",
            measured={"steps": float(len(at))},
        )


def _returning_line(code: CodeType) -> Site:
    """Return the line of a function's only return of a value; its first line where there are more."""
    source = parsed(code.co_filename)
    first = Site(code.co_filename, code.co_firstlineno, code.co_qualname)
    if source is None:
        return first
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            lines = {node.lineno, *[decorator.lineno for decorator in node.decorator_list]}
            if code.co_firstlineno in lines:
                returns = [s for s in statements(node) if isinstance(s, ast.Return) and s.value is not None]
                return first._replace(line=returns[0].lineno) if len(returns) == 1 else first
    return first
