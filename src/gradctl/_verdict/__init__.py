"""What a journal says: one sentence, eight figures, findings. Sees only the journal; imports no torch."""

from __future__ import annotations

from gradctl._journal import Run
from gradctl._results import Finding
from gradctl._verdict import _health, _stepping, _whole
from gradctl._verdict._facts import Facts, Failure
from gradctl._verdict._figures import figures
from gradctl._verdict._sentence import sentence
from gradctl._verdict._statement import Figure, Level, Verdict
from gradctl._verdict._stepping import SLUGS as STEPPING
from gradctl._verdict._training import Training
from gradctl._verdict._whole import Lateness, lateness, missed

__all__ = [
    "STEPPING",
    "Facts",
    "Failure",
    "Figure",
    "Lateness",
    "Level",
    "Training",
    "Verdict",
    "judge",
    "judge_facts",
    "lateness",
    "missed",
]

_ORDER = {"error": 0, "warning": 1, "note": 2}
_OF_ONE_PLACE = ("never-reached", "no-gradient", "unoptimized")  # on pipelines each rank has its own


def judge(run: Run) -> Verdict:
    """Judge a run by its journals.

    Args:
        run: a run directory, read.

    Returns:
        The sentence, the figures and the findings, worst first; of equal ones in the order of the rules.
    """
    return judge_facts(Facts(run))


def judge_facts(facts: Facts) -> Verdict:
    """Judge facts that are at hand already; see `judge`.

    Args:
        facts: a run, read.

    Returns:
        What `judge` returns.
    """
    findings = tuple(sorted(_findings(facts), key=lambda f: _ORDER.get(f.severity, 2)))
    words, level = sentence(facts, findings)
    training = facts.training
    return Verdict(
        sentence=words,
        level=level,
        findings=findings,
        figures=figures(facts),
        main=facts.main,
        main_optimizer=training.id if training else None,
        stages=tuple(t.id for t in facts.stages),
        first_bad_step=training.nonfinite.first if training and training.nonfinite else None,
    )


def _findings(facts: Facts) -> list[Finding]:
    """Run every rule; what holds on several ranks or in several stages alike is said once."""
    found: dict[tuple[object, ...], Finding] = {}
    stages = {t.id for t in facts.stages}
    for _, trainings in facts.by_rank:
        for rule in (*_health.RULES, *_stepping.RULES):
            for training in trainings:
                group = -1 if training.id in stages else training.id
                for finding in rule(facts, training):
                    place = finding.parameters if finding.slug in _OF_ONE_PLACE else ()
                    found.setdefault((finding.slug, group, place), finding)
    return [*found.values(), *(finding for rule in _whole.RULES for finding in rule(facts))]
