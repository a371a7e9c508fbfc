"""The verdict in one sentence: is it broken, since when, where; else that it works, as far as that was seen."""

from __future__ import annotations

from gradctl._journal import Journal
from gradctl._results import Finding
from gradctl._verdict._facts import Facts, ended_at, is_alive
from gradctl._verdict._statement import Level
from gradctl._verdict._training import Training, short_name
from gradctl._verdict._whole import missed
from gradctl._verdict._words import count, number

SLOW = ("late-rank", "data-loader")
INTERRUPTS = ("KeyboardInterrupt", "SystemExit")


def sentence(facts: Facts, findings: tuple[Finding, ...]) -> tuple[str, Level]:
    """Return the sentence and its level.

    The first clause is about gradients: the worst finding, or that all is well. A run that did not end by itself says
    so in a second clause.
    """
    if facts.record is None and facts.training is None:
        return "The journal holds no run: nothing was recorded.", "warning"
    body, level = _body(facts, findings)
    how, ended = _ending(facts)
    if not how:
        return f"{body}.", level
    worst = max(level, ended, key=_order)
    if _off(facts) or _order(ended) <= max(_order(level), _order("note")):
        return f"{body}; {how}.", worst
    # what ended the run is worse than what its gradients did: it comes first, and what is merely slow is left out
    told = facts.training is not None and level == "warning" and findings[0].slug not in SLOW
    return f"{how[0].upper()}{how[1:]}{'; ' + body if told else ''}.", worst


def _order(level: Level) -> int:
    return ("good", "note", "warning", "error").index(level)


def _body(facts: Facts, findings: tuple[Finding, ...]) -> tuple[str, Level]:
    if _off(facts):
        seen = facts.steps
        return "Gradients were off for the whole run" + (
            f"; {count(seen, 'optimizer step')} changed nothing" if seen else ""
        ), "note"
    level = _level(findings)
    lead = findings[0] if findings and findings[0].severity != "note" else None
    bad = next((t for _, ts in facts.by_rank for t in ts if _is_lost(t)), None)
    if bad is not None and bad.nonfinite is not None and lead is not None and lead.slug.startswith("nonfinite"):
        return _nonfinite(bad), level
    if facts.training is None and lead is not None and lead.slug == "never-stepped":
        return lead.symptom, level
    if facts.training is None:
        lost = missed(facts)
        return (f"Training was not seen: {lost[0][0]}", "warning") if lost else (_nothing(facts), "note")
    if lead is not None:
        return lead.symptom, level
    if level == "good" and not any(t.reached is not None for t in facts.trainings):
        level = "note"  # what was not measured is not well
    return _well(facts, findings), level


def _is_lost(training: Training) -> bool:
    found = training.nonfinite
    return found is not None and (found.lasting or found.first > training.steps)


def _level(findings: tuple[Finding, ...]) -> Level:
    for severity in ("error", "warning", "note"):
        if any(f.severity == severity for f in findings):
            # a tip alone does not make a healthy run less than good
            return "good" if severity == "note" else severity
    return "good"


def _nonfinite(training: Training) -> str:
    found = training.nonfinite
    assert found is not None
    what = {"gradient": "Gradients", "loss": "The loss", "weight": "Weights"}[found.where]
    start = f"{what} became NaN at step {found.first}"
    if training.steps < found.first:
        return start
    if training.steps <= found.first:
        return f"{start}, the last one"
    if found.share >= 0.9 or found.share == 0.0:
        return f"{start}; nothing was learned after it"
    return f"{start} and part of the model stayed so"


def _nothing(facts: Facts) -> str:
    backwards = sum(j.end.backwards for j in facts.run.journals if j.end)
    if backwards:
        return f"No training step was seen, only {count(backwards, 'backward')}"
    return "No training step and no backward was seen"


def _well(facts: Facts, findings: tuple[Finding, ...]) -> str:
    steps, reached = facts.steps, [t.reached for t in facts.trainings]
    slugs = {f.slug for f in findings}
    if not any(r is not None for r in reached):
        return f"{count(steps, 'step')} {'was' if steps == 1 else 'were'} recorded; gradients were not measured"
    known = [t for t in facts.trainings if t.reached is not None]
    reach, expected = sum(t.reached or 0 for t in known), sum(t.expected for t in known)
    # no event tells the missing ones from frozen ones when a run stops in its first steps: no accusation, no praise
    body = (
        f"Gradients reach {reach} of {expected} parameters" if reach < expected else "Gradients reach every parameter"
    )
    trend = facts.trend
    falls = trend is not None and trend.kind == "falls" and trend.last == trend.last
    if steps < 5:
        seen = f"in the {'one step that was' if steps == 1 else f'{steps} steps that were'} seen"
        return f"{body} {seen}{', and the loss falls' if falls else ''}"
    watched = f" in the first {steps} steps" if facts.watched else ""
    if falls:
        return f"{body} and the loss falls{watched}"
    if "loss-flat" in slugs and trend is not None:
        return f"{body}{watched}; the loss stays at {number(trend.last)}"
    return f"{body}{watched}"


def _off(facts: Facts) -> bool:
    return facts.record is not None and facts.record.grad == "off"


def _ending(facts: Facts) -> tuple[str, Level]:
    """How the run ended, as a clause; empty when it ended by itself and well."""
    if facts.still_running:
        return f"it is still running, {count(facts.steps, 'step')} so far", "good"
    after = _after(facts, facts.main)
    failure = facts.failure
    if failure is not None and failure.type and failure.type not in INTERRUPTS:
        name = short_name(failure.type.rpartition(".")[2])
        where = f" at {failure.span}" if failure.span else ""
        who = "the script" if failure.rank is None else f"rank {failure.rank}"
        if name == "NonFiniteGradient":
            return f"it was stopped{where} before the update", "error"
        if name == "BackwardRefused":
            return f"backward was refused{where}", "error"
        return f"{who} raised {name}{where}{_after(facts, failure.journal)}", "error"
    if failure is not None and failure.type == "KeyboardInterrupt":
        return f"it was interrupted by hand{after}", "note"
    failed = _failed_rank(facts)
    if failed is not None and failed.end is not None:
        return f"rank {_rank(failed)} ended with exit code {failed.end.code}{_after(facts, failed)}", "error"
    silent = [j for j in facts.ranks if j.end is None and not (j.run and is_alive(j.run))]
    if facts.end is None and facts.process is not None:
        return f"the script stopped{_at(facts)} without saying goodbye", "warning"
    if silent and facts.several:
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        ranks = ", ".join(str(j.rank) for j in silent[:8]) + more
        return f"rank{'s' if len(silent) > 1 else ''} {ranks} stopped without saying goodbye", "warning"
    code = facts.end.code if facts.end else None
    if code:
        return f"the script exited with code {code}{after if facts.training else ''}", "warning"
    return "", "good"


def _failed_rank(facts: Facts) -> Journal | None:
    """Of several ranks: the first by the clock to end with an exit code of its own that is not 0."""
    if not facts.several:
        return None
    failed = [j for j in facts.ranks if j.end is not None and j.end.code]
    if len(failed) == len(facts.ranks) and len({j.end.code for j in failed if j.end}) == 1:
        return None  # all alike: the script did
    return min(failed, key=lambda j: (ended_at(j), j.rank), default=None)


def _rank(journal: Journal) -> int:
    return journal.run.rank if journal.is_child and journal.run else journal.rank


def _after(facts: Facts, journal: Journal | None) -> str:
    steps = next((found for j, found in facts.by_rank if j is journal), facts.trainings)
    taken = max((t.steps for t in steps), default=0) if journal is not facts.main else facts.steps
    if not taken:
        return " before any step"
    return f" after more than {count(taken, 'step')}" if facts.watched else f" after {count(taken, 'step')}"


def _at(facts: Facts) -> str:
    return f" at step {facts.steps}" if facts.training else " before any step"
