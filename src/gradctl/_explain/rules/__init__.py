"""The rules: one for each root cause, over the facts. Each returns candidates; `_rank` decides which are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradctl._explain._context import Candidate, Context

Rule = Callable[[Context], Iterable[Candidate]]


def every_rule() -> list[Rule]:
    """Return all rules, those that explain an exception first."""
    from gradctl._explain.rules import cuts, errors, numbers, order, terms, unreached, wiring

    return [rule for module in (errors, cuts, terms, unreached, wiring, order, numbers) for rule in module.RULES]
