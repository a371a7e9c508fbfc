"""The line that a rule about the order of a step points at: where it is, and how it should be written."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

from gradctl._results import Finding, Severity, Span
from gradctl._verdict._facts import Facts
from gradctl._verdict._groups import Group, Order
from gradctl._verdict._training import Training
from gradctl._verdict._words import percent

Places = tuple[tuple[int, str], ...]


def step_line(facts: Facts, training: Training) -> Span | None:
    """Return where the program steps this optimizer, if that was seen."""
    order = training.order
    return span_of(facts, order, order.step_site)


# -- the line as it should be written ---------------------------------------------------------------------------------


def divided(text: str, size: int) -> str:
    """Return a line that calls backward, with its loss divided by `size`; empty if the line cannot be read."""
    scaled_loss = re.fullmatch(r"(.*\.scale\()(.+)(\)\.backward\(.*)", text)
    if scaled_loss is not None:
        return f"{scaled_loss[1]}{_factor(scaled_loss[2], size)}{scaled_loss[3]}"
    loss, rest = _backward(text)
    return f"({_factor(loss, size)}).backward({rest}" if loss else ""


def scaled(text: str, scaler: str) -> str:
    """Return a line that calls backward, with its loss scaled; empty if the line cannot be read."""
    loss, rest = _backward(text)
    return f"{scaler}.scale({loss}).backward({rest}" if loss else ""


def stepped(text: str) -> str:
    """Return a line that steps an optimizer, through the scaler."""
    plain = re.fullmatch(r"([\w.\[\]]+)\.step\(\)(.*)", text)
    return f"scaler.step({plain[1]}){plain[2]}" if plain is not None else "scaler.step(optimizer)"


def _backward(text: str) -> tuple[str, str]:
    """Return the loss of a line that calls backward, and what follows the bracket; empty if it is no whole one."""
    plain = re.fullmatch(r"([^=]+?)\.backward\((.*)", text)
    return (plain[1], plain[2]) if plain is not None and text.count("(") == text.count(")") else ("", "")


def _factor(expression: str, size: int) -> str:
    try:
        tree = ast.parse(expression, mode="eval").body
        # what stands in brackets already begins after the first of them
        simple = isinstance(tree, ast.Name | ast.Attribute | ast.Call | ast.Subscript) or tree.col_offset > 0
        simple = simple and (tree.col_offset == 0 or tree.end_col_offset == len(expression) - tree.col_offset)
    except (SyntaxError, ValueError):
        simple = False
    return f"{expression} / {size}" if simple else f"({expression}) / {size}"


def as_written(words: str, line: str, otherwise: str = "") -> str:
    return f"{words}:\n{line}" if line else f"{words}: {otherwise}"


def names_of(order: Order, group: Group) -> tuple[str, str]:
    """Return what the source calls the scaler and the optimizer."""
    sites = [op.site for g in (group, *order.groups) for op in g.ops if op.kind == "t" and op.has("o")]
    for site in sites:
        found = re.search(r"([\w.]+)\.step\(([\w.\[\]]+)", text_of(order, site))
        if found is not None:
            return found[1], found[2]
    return "scaler", "optimizer"


# -- small things -----------------------------------------------------------------------------------------------------


def total_of(groups: Iterable[Group]) -> int:
    return sum({id(group): group.count for group in groups}.values())


def is_habit(hits: int, order: Order) -> bool:
    return hits > 0 and (hits >= 2 or hits == order.watched)


def share_of(hits: int, order: Order) -> str:
    if hits >= order.watched:
        return "every step that was watched" if hits > 1 else "the one step that was watched"
    return f"{hits} of {order.watched} steps that were watched ({percent(hits / order.watched)})"


def text_of(order: Order, site: int) -> str:
    return order.sites[site].text if site in order.sites else ""


def span_of(facts: Facts, order: Order, site: int, role: str = "") -> Span | None:
    place = order.sites.get(site)
    found = None if place is None else facts.span({"file": place.file, "line": place.line}, order.journal)
    return None if found is None else Span(found.file, found.line, role)


def numbers_of(**numbers: float | None) -> dict[str, float] | None:
    return {name: value for name, value in numbers.items() if value is not None} or None


def first_of(facts: Facts, training: Training) -> Training:
    return next(found[0] for journal, found in facts.by_rank if journal is training.journal)


def says(
    facts: Facts,
    order: Order,
    slug: str,
    site: int,
    symptom: str,
    why: str,
    fix: str,
    *,
    severity: Severity = "warning",
    also: Places = (),
    measured: dict[str, float] | None = None,
) -> Iterator[Finding]:
    """Yield a finding, if its place is known: without a line it would be no help."""
    primary = span_of(facts, order, site)
    if primary is None:
        return
    spans = (span_of(facts, order, other, role) for other, role in also if other != site)
    evidence = tuple(span for span in spans if span is not None)
    fix = fix.rstrip("\n")
    yield Finding(slug, severity, symptom, why, fix, 1.0, primary, evidence, (), measured)
