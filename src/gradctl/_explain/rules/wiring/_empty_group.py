"""param_not_in_optimizer: a parameter group is empty, and parameters of the model are trained by nobody."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain._source import Source, definitions, source_of, value_of_binding
from gradctl._explain.rules.wiring._unheld import unheld
from gradctl._lineage import Site, Stack


def empty_group(context: Context) -> Iterable[Candidate]:
    """Find optimizers with a group of no parameters: a generator that was used up, a name filter that fits nothing."""
    left = [key for key, stranger in unheld(context).items() if stranger.is_parameter]
    if not left:
        return
    for optimizer in context.facts.optimizers.values():
        if not optimizer.steps or not optimizer.held or not optimizer.empty_groups:
            continue
        number = optimizer.empty_groups[0]
        yield Candidate(
            "param_not_in_optimizer",
            _line_of_group(optimizer.stack, number) or place(optimizer.stack),
            f"{count(len(left), 'parameter')} got gradients, and no optimizer holds them: group {number} of "
            f"{optimizer.name} is empty",
            "an empty group trains nothing; a generator gives its parameters once, and a filter may match no name",
            fix="build the group from a list, and check that it is not empty",
            confidence=0.85,
            evidence=((place(optimizer.stack), "optimizer built"),),
            parameters=tuple(sorted(left)),
            explains="wiring",
            measured={"parameters": float(len(left))},
        )


def _line_of_group(stack: Stack, number: int) -> Site | None:
    """Return the line of the group's own dictionary where the call spells its groups out."""
    where = place(stack)
    source = source_of(stack[0]) if stack else None
    call = source.expression(stack[0]) if source is not None else None
    if source is None or where is None or not isinstance(call, ast.Call):
        return None
    for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
        if isinstance(argument, ast.List) and number < len(argument.elts):
            group = argument.elts[number]
            return where._replace(line=_generator(source, group) or group.lineno)
    return None


def _generator(source: Source, group: ast.expr) -> int | None:
    """Return the line of the generator expression that a group takes its parameters from; it may be used up."""
    statement = source.statement_of(group)
    if statement is None:
        return None
    for name in [part.id for part in ast.walk(group) if isinstance(part, ast.Name)]:
        for definition in definitions(source, name, statement):
            if isinstance(value_of_binding(definition), ast.GeneratorExp):
                return definition.lineno
    return None
