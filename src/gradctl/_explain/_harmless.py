"""Breaks between forward and backward that do no harm, as far as the facts say: for `--notes`."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain._cuts import Cut, describe
from gradctl._explain._source import source_of
from gradctl._explain.rules.cuts import escape_words
from gradctl._lineage import Break, Site, note_breaks, site, source

_MOST = 20
_CONFIDENCE = 0.3
_ANOTHER_WAY = "every parameter behind it gets a gradient by another way"
_NUMBERS = "it is used for numbers only"
_CALLS = frozenset(
    [
        *("detach", "detach_", "data", "tensor", "as_tensor", "asarray", "scalar_tensor", "item", "tolist", "numpy"),
        *("array", "float", "int", "bool", "complex", "round", "format", "print", "str", "max", "min", "abs", "sum"),
    ]
)
"""What a line calls that cuts there itself; where it calls something else, the cut is inside of that."""


def harmless(context: Context, told: Sequence[Candidate]) -> list[Candidate]:
    """Return a note for each line that cuts a value of a trained parameter and explains nothing.

    Args:
        context: the facts.
        told: what is told already; its lines, and what it explains, are left out.
    """
    facts = context.facts
    found: dict[object, Break] = dict(facts.breaks)
    late: dict[object, Break] = {}
    note_breaks(
        late,
        [node for nodes in context.tracer.log.values() for node in nodes],
        facts.escapes,
        [root for backward in facts.backwards if backward.accumulates for root in backward.roots],
    )
    trained = {
        id(known.node): key
        for key in context.held()
        if (known := facts.parameters.get(key)) is not None and not context.is_hand_written(known)
    }
    suffering = {key for c in told if c.severity != "note" for key in c.parameters}
    lines = {(c.place.file, c.place.line) for c in told if c.place is not None}
    notes: list[Candidate] = []
    for entry in (late | found).values():
        keys = tuple([trained[leaf] for leaf in entry.leaves if leaf in trained])
        if not keys or any(not facts.parameters[key].reached or key in suffering for key in keys):
            continue
        cut = _described(entry)
        if cut is None or cut.place is None or (cut.place.file, cut.place.line) in lines:
            continue
        lines.add((cut.place.file, cut.place.line))
        reason = _ANOTHER_WAY if entry.in_loss else _NUMBERS
        notes.append(
            Candidate(
                cut.slug,
                cut.place,
                f"a value of {count(len(keys), 'parameter')} is cut here; {reason}",
                f"{cut.why}; {reason}",
                "none is needed",
                confidence=_CONFIDENCE,
                severity="note",
                parameters=keys,
            )
        )
        if len(notes) == _MOST:
            break
    return notes


def _described(entry: Break) -> Cut | None:
    """Return what a break is called and where it stands; None for one that the user's line does not make itself."""
    if entry.escape is not None:
        slug, how = escape_words(entry.escape)
        where = place(entry.stack)
        return Cut(slug, where, f"{how} turns the value into plain data here") if _is_own(entry) else None
    cut = describe(entry.node)
    if entry.node.region is not None:
        return cut if _switches(entry, cut.place) else None
    return cut if _is_own(entry) else None


def _is_own(entry: Break) -> bool:
    """Whether the line reads or converts the value itself, instead of calling what does."""
    found = source_of(entry.stack[0])
    expression = found.expression(entry.stack[0]) if found is not None else None
    if not isinstance(expression, ast.Call):
        return expression is not None
    function = expression.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _CALLS


def _switches(entry: Break, where: Site | None) -> bool:
    """Whether the line switches gradients off itself: torch's own functions do so too."""
    region = entry.node.region
    assert region is not None
    if region.decorated is not None:
        return True
    words = ("no_grad", "inference_mode", "set_grad_enabled")
    return where is not None and any(word in source(site(entry.stack[0])) for word in words)
