"""From candidates to findings: the best for each symptom, ranked by evidence, and nothing below the threshold."""

from __future__ import annotations

from dataclasses import replace

from gradctl._explain._context import THRESHOLD, Candidate, Context
from gradctl._explain._harmless import harmless
from gradctl._explain._path import path_line
from gradctl._explain.rules import every_rule
from gradctl._results import Finding

_FIRST = ("error", "nonfinite", "order", "none", "zero", "wiring", "wrong", "memory")


def diagnose(context: Context, *, notes: bool = False) -> list[Finding]:
    """Return the findings, most certain first.

    Args:
        context: the facts.
        notes: show what is harmless or uncertain too, as notes.
    """
    with context.looking():
        candidates = _candidates(context)
        kept = _without_lesser(candidates)
        shown = [c for c in kept if _is_sure(c)]
        if notes:
            shown += [replace(c, severity="note") for c in kept if not _is_sure(c)]
            shown += harmless(context, shown)
        ended = any(c.explains == "error" and c.confidence >= THRESHOLD for c in shown)
        shown.sort(
            key=lambda c: (
                c.severity == "note",
                ended and c.explains != "error",
                -c.confidence,
                _FIRST.index(c.explains),
            )
        )
        context.name_all(
            {key for c in shown for key in c.parameters} | {k for c in shown for k in context.ids_on_path(c)}
        )
        return [_finding(context, c) for c in shown]


def _is_sure(candidate: Candidate) -> bool:
    return candidate.confidence >= THRESHOLD and candidate.severity != "note" and candidate.place is not None


def _candidates(context: Context) -> list[Candidate]:
    """Ask all rules; a rule that fails is noted among the faults, and the others speak all the same."""
    found: list[Candidate] = []
    for rule in every_rule():
        try:
            found += list(rule(context))
        except Exception as fault:
            context.tracer.faults.append(f"{rule.__name__}: {type(fault).__name__}: {fault}")
    return found


def _is_beside(candidate: Candidate, error: Candidate) -> bool:
    """Whether what loses a gradient without an error concerns other parameters than the error does."""
    mine = set(candidate.parameters)
    return bool(mine) and mine.isdisjoint(error.parameters) and (bool(error.parameters) or error.node is not None)


def _without_lesser(candidates: list[Candidate]) -> list[Candidate]:
    """Drop candidates whose parameters and symptom a more certain one explains already, and doubles."""
    if any(c.explains == "error" and c.confidence >= THRESHOLD for c in candidates):
        # What ended the program comes first; what follows from the same place is not said twice.
        best = max((c for c in candidates if c.explains == "error"), key=lambda c: c.confidence)
        candidates = [best] + [
            c
            for c in candidates
            if c is not best
            and c.explains != "error"
            and c.place != best.place
            and (c.explains not in ("none", "zero") or _is_beside(c, best))
        ]
    kept: list[Candidate] = []
    explained: set[int] = set()
    places: set[object] = set()
    for candidate in sorted(candidates, key=lambda c: -c.confidence):
        key = (candidate.slug, candidate.place)
        if key in places:
            continue
        mine = set(candidate.parameters)
        if mine and mine <= explained and candidate.severity != "note":
            continue
        places.add(key)
        if candidate.confidence >= THRESHOLD and candidate.severity != "note":
            explained |= mine
        kept.append(candidate)
    return kept


def _finding(context: Context, candidate: Candidate) -> Finding:
    from gradctl._explain._fixes import fix_for
    from gradctl._explain._mend import mend

    seen = {candidate.place}
    evidence = []
    for place, role in candidate.evidence:
        if place is not None and place not in seen:
            seen.add(place)
            evidence.append(context.span(place, role))
    names = sorted({name for key in candidate.parameters if (name := context.name(key))})
    return Finding(
        slug=candidate.slug,
        severity=candidate.severity,
        symptom=candidate.symptom,
        why=candidate.why,
        fix=candidate.fix or mend(candidate) or fix_for(candidate.slug),
        confidence=round(candidate.confidence, 2),
        primary=context.span(candidate.place) if candidate.place is not None else None,
        evidence=tuple(evidence),
        parameters=tuple(names),
        measured=candidate.measured,
        path=path_line(context, candidate),
    )
