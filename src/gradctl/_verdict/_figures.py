"""The eight figures of the row below the sentence."""

from __future__ import annotations

import math

from gradctl._verdict._facts import Facts
from gradctl._verdict._statement import Figure
from gradctl._verdict._training import Training
from gradctl._verdict._words import count, milliseconds, number, percent, size


def figures(facts: Facts) -> tuple[Figure, ...]:
    """Return loss, steps, time, reached, non-finite, clipped, saved bytes and peak memory, in this order."""
    training = facts.training
    return (
        _loss(facts),
        _steps(facts, training),
        _time(training),
        _reached(facts),
        _nonfinite(facts),
        _clipped(training),
        _saved(facts),
        _memory(facts),
    )


def _loss(facts: Facts) -> Figure:
    detail = ""
    if facts.watched:
        detail = f"of the first {facts.watched}"
    elif facts.training is not None and len(facts.players) > 1:
        detail = f"{facts.training.record.cls} {facts.training.id}, of {len(facts.players)} optimizers"
    seen = facts.trend
    if seen is None:
        bad = facts.training is not None and any(b.bad for b in facts.training.blocks)
        return Figure("loss", "NaN" if bad else "not seen", detail)
    if facts.steps == 1:
        return Figure("loss", number(seen.first), detail)
    return Figure("loss", f"{number(seen.first)} → {number(seen.last)}", detail)


def _steps(facts: Facts, training: Training | None) -> Figure:
    if training is None:
        return Figure("steps", "0")
    words: list[str] = []
    if facts.watched:
        words.append("the first ones, no more were watched")
    if training.record.source == "backward":
        words.append("backwards, no optimizer")
    if len(facts.stages) > 1:
        words.append(f"{len(facts.stages)} optimizers together")
    elif training.microbatches >= 2 * training.steps:
        words.append(f"{round(training.microbatches / training.steps)} backwards before each")
    if training.skipped:
        words.append(f"{training.skipped} skipped by the scaler")
    return Figure("steps", f"{training.steps:,}", ", ".join(words))


def _time(training: Training | None) -> Figure:
    times = training.milliseconds() if training else None
    return Figure("step", milliseconds(times[0]) if times else "not measured")


def _reached(facts: Facts) -> Figure:
    known = [t for t in facts.trainings if t.reached is not None]
    if not known:
        return Figure("parameters reached", "not measured")
    reached, expected = sum(t.reached or 0 for t in known), sum(t.expected for t in known)
    frozen = sum(t.record.frozen for t in known)
    return Figure("parameters reached", f"{reached} / {expected}", f"{frozen} frozen" if frozen > 0 else "")


def _nonfinite(facts: Facts) -> Figure:
    found = [t.nonfinite for _, ts in facts.by_rank for t in ts if t.nonfinite is not None]
    if not found:
        return Figure("non-finite", "0", f"of the first {facts.watched}" if facts.watched else "")
    worst = max(found, key=lambda f: f.steps)
    return Figure(
        "non-finite",
        count(worst.steps, "step"),
        f"from step {worst.first}"
        if worst.lasting
        else f"first at step {worst.first}" + (", skipped by the scaler" if worst.skipped else ""),
    )


def _clipped(training: Training | None) -> Figure:
    found = training.clipping() if training else None
    if found is None:
        return Figure("clipped", "no clipping")
    calls, hit, limit, _ = found
    return Figure(
        "clipped", percent(min(1.0, hit / calls)), f"limit {number(limit)}" if math.isfinite(limit) else "measured only"
    )


def _saved(facts: Facts) -> Figure:
    saved = facts.main.saved[-1] if facts.main and facts.main.saved else None
    return Figure("saved for backward", size(max(0, saved.total)) if saved else "not measured")


def _memory(facts: Facts) -> Figure:
    if facts.main is None:
        return Figure("peak memory", "not measured")
    rows = facts.main.rows
    host = max(
        [r.rss for r in rows if r.rss is not None] + [facts.main.end.rss or 0.0 if facts.main.end else 0.0], default=0.0
    )
    device = max((r.cuda for r in rows if r.cuda is not None), default=0.0)
    if device > 0 and math.isfinite(device):
        where = f"of the GPU; host {size(host * (1 << 20))}" if host > 0 else "of the GPU"
        return Figure("peak memory", size(device * (1 << 20)), _with_plan(where, facts))
    return Figure(
        "peak memory", size(host * (1 << 20)) if 0 < host < math.inf else "not measured", _with_plan("", facts)
    )


def _with_plan(detail: str, facts: Facts) -> str:
    """Add what a plan of `gradctl fit` has come to, where one was given."""
    plan = facts.plan
    if plan is None:
        return detail
    if not plan.get("applied"):
        words = "the plan was not applied"
    else:
        budget, predicted, measured = plan["budget"], plan["predicted"], plan.get("measured")
        step = size(measured) if measured is not None else f"{size(predicted)} predicted"
        words = f"plan: {step} of {size(budget)}"
    return f"{detail}; {words}" if detail else words
