"""A run for other programs: `gradctl.summary/1`."""

from __future__ import annotations

import math
from typing import Any

from gradctl._journal import Journal, Run
from gradctl._results import Finding
from gradctl._verdict import Facts, Verdict, judge_facts
from gradctl._verdict._loss import trend
from gradctl._verdict._main import main_training
from gradctl._verdict._training import Training, trainings

SCHEMA = "gradctl.summary/1"


def summary(run: Run) -> dict[str, Any]:
    """Return what `gradctl report --json` writes.

    Args:
        run: a run directory, read.

    Returns:
        JSON values only: no NaN (null stands there), no text that UTF-8 cannot hold.
    """
    facts = Facts(run)
    return of(facts, judge_facts(facts))


def of(facts: Facts, verdict: Verdict) -> dict[str, Any]:
    """Return the summary of facts and a verdict that are at hand already.

    Args:
        facts: a run, read.
        verdict: what was judged of it.

    Returns:
        What `summary` returns.
    """
    others = [j for j in facts.run.children if j not in facts.ranks and trainings(j)]
    return _plain(
        {
            "schema": SCHEMA,
            "script": facts.record.script if facts.record else "",
            "exit_code": facts.end.code if facts.end else None,
            "verdict": verdict.sentence,
            "findings": [_finding(finding) for finding in verdict.findings],
            "ranks": [_rank(journal) for journal in (*facts.ranks, *others)],
        }
    )


def _finding(finding: Finding) -> dict[str, Any]:
    return finding.to_json()


def _rank(journal: Journal) -> dict[str, Any]:
    found = trainings(journal)
    main, _ = main_training(found)
    end = journal.end
    seen = trend(main) if main else None
    bad = [t.nonfinite.steps for t in found if t.nonfinite is not None]
    return {
        "rank": journal.run.rank if journal.is_child and journal.run else journal.rank,
        "pid": journal.pid,
        "ended": end.how if end else None,
        "steps": main.steps if main else 0,
        "backwards": end.backwards if end else sum(t.microbatches for t in found),
        "optimizers": [_optimizer(training) for training in found],
        "nonfinite_steps": max(bad, default=0),
        "skipped_steps": max((t.skipped for t in found), default=0),
        **_plan(journal),
        "loss": {"first": seen.first if seen else None, "last": seen.last if seen else None},
        "recorder": {
            "share": end.share if end else None,
            "faults": end.faults if end else len(journal.named("fault")),
            "not_seen": [f"{what}: {why}" if why else what for what, why in _not_seen(journal)],
        },
    }


def _optimizer(training: Training) -> dict[str, Any]:
    return {"class": training.record.cls, "parameters": training.expected, "reached": training.reached}


def _plan(journal: Journal) -> dict[str, Any]:
    """Return what became of the plan that the run was given, if it was given one."""
    told = journal.named("plan")
    if not told:
        return {}
    keys = ("applied", "model", "budget", "predicted", "measured", "why")
    return {"plan": {key: told[-1].data[key] for key in keys if key in told[-1].data}}


def _not_seen(journal: Journal) -> list[tuple[str, str]]:
    told = [(str(e.data.get("what", "")), str(e.data.get("why", ""))) for e in journal.named("not_seen")]
    return list(dict.fromkeys([*told, *(journal.end.not_seen if journal.end else ())]))


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
