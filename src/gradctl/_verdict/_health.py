"""Is training broken: non-finite values, parameters that are not reached or do not move, losses that blow up.

Each rule looks at one optimizer and yields findings. A false alarm is worse than a miss: every rule that judges a
tendency asks for a minimum of steps, and nothing is said against a loss alone unless it blew up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

from gradctl._results import Finding, Severity
from gradctl._verdict._facts import Facts
from gradctl._verdict._fixes import finding
from gradctl._verdict._lines import step_line
from gradctl._verdict._loss import trend
from gradctl._verdict._training import Training, command, real, short_name, texts, whole
from gradctl._verdict._words import count, named, number, percent

STEPS_TO_JUDGE = 50
"""Tendencies of fewer steps are not judged."""
STEPS_FOR_A_FACT = 10
"""What is exact, and not a tendency, needs no more than these: a warm-up may begin at zero."""
ROWS_TO_JUDGE = 8
NORMS_TO_JUDGE = 4
"""A short run of a small model is sampled a few times only; six decades need no more."""
FAST = 0.5
"""Half of its own size a step: a weight that moves so far walks at random."""
QUICK = 0.1
BEFORE_A_FALL = 0.01
"""Only where gradients did become non-finite: what moved more than this a step just before."""
SLOW = 1e-7
"""Below the resolution of float32: such an update rounds to nothing."""
VANISHED = 1e-6
_NO_SCRIPT = ("notebook", "interactive")


def nonfinite(facts: Facts, training: Training) -> Iterator[Finding]:
    """NaN or inf in gradients, loss or weights: when, where, and whether it lasted."""
    found = training.nonfinite
    if found is None:
        return
    slug = f"nonfinite-{found.where}"
    what = {"gradient": "Gradients", "loss": "The loss", "weight": "Weights"}[found.where]
    be = ("became", "was") if found.where == "loss" else ("became", "were")
    who = _who(facts, training)
    names = f"{found.count} of {found.of} tensors at once: {named(found.names, found.count)}. " if found.names else ""
    severity: Severity = "error"
    line = slug
    if found.skipped:
        often = "" if found.steps == 1 else f" in {found.steps} steps, first"
        them = "it" if found.steps == 1 else "them"
        symptom = f"{what} {be[1]} NaN or inf{often} at step {found.first}{who}; {training.who_skips} skipped {them}"
        line = "nonfinite-skipped" if training.who_skips == "the loss scaler" else "nonfinite-stopped"
        why, severity = f"{names}No weight took such an update.", "note"
    elif found.first > training.steps:
        symptom = f"{what} {be[0]} NaN or inf at step {found.first}{who}"
        why, line = (
            f"{names}That step was not taken: the weights are those of step {training.steps}.",
            "nonfinite-stopped",
        )
    elif found.lasting:
        symptom = f"{what} {be[0]} NaN or inf at step {found.first}{who}"
        lost = training.steps - found.first
        after = f"All {count(lost, 'later step')} are lost." if lost > 1 else "It was the last step."
        if lost > 1 and 0 < found.share < 0.9:
            after = f"{percent(found.share)} of the tensors are still NaN at the end."
        why = f"{names}The update of that step poisoned the weights. {after}" if lost >= 1 else f"{names}{after}"
    else:
        often = f"{found.steps} of {count(training.steps, 'step')}"
        symptom = f"{what} {be[1]} NaN or inf in {often}, first at step {found.first}{who}"
        why = f"{names}Training recovered; a weight that took such an update would not have."
        line_search = "LBFGS" in training.record.cls and found.where == "loss"
        severity = "note" if line_search else "warning"
    yield finding(
        slug,
        severity,
        symptom,
        why,
        step=str(found.first),
        line=_line(facts, line),
        script=_script(facts),
        parameters=found.names,
        measured={"step": found.first, "steps": found.steps, "tensors": found.count},
    )
    if found.lasting and found.first > 3:
        yield from _moved_before(training, found.first)


def _moved_before(training: Training, step: int) -> Iterator[Finding]:
    before = [r for r in training.rows if r.n < step][-5:]
    ratios = training.ratios(before)
    moved = sorted(((u, i) for i, u in ratios.items() if u > BEFORE_A_FALL), reverse=True)
    if len(before) < 2 or len(ratios) < 2 or 2 * len(moved) < len(ratios):
        return
    worst = ", ".join(f"{training.name(i)} {percent(u)}" for u, i in moved[:2])
    yield finding(
        "weights-before",
        "warning",
        f"{len(moved)} of {len(ratios)} weight matrices moved more than 1 % of their own size a step just before",
        f"Largest: {worst}.",
        confidence=0.7,
        parameters=tuple(training.name(i) for _, i in moved[:50]),
        measured={"update_to_weight": moved[0][0]},
    )


def never_reached(facts: Facts, training: Training) -> Iterator[Finding]:
    """Parameters of an optimizer that no backward ever reached."""
    lost, names = training.never
    if not lost:
        return
    shown = tuple(short_name(n) for n in names)
    if lost >= training.expected:
        yield finding(
            "no-gradient",
            "error",
            f"None of {count(training.expected, 'parameter')} ever got a gradient{_who(facts, training)}",
            f"{count(training.steps, 'step')} of {training.record.cls} changed nothing.",
            parameters=shown,
            line=_line(facts, "no-gradient"),
            script=_script(facts),
            measured={"parameters": lost},
        )
        return
    yield finding(
        "never-reached",
        "warning",
        f"{lost} of {count(training.expected, 'parameter')} never got a gradient{_who(facts, training)}",
        f"{named(shown, lost)}: held by the optimizer, and no loss reaches {'it' if lost == 1 else 'them'}.",
        parameters=shown,
        line=_line(facts, "never-reached"),
        script=_script(facts),
        measured={"parameters": lost},
    )


def unoptimized(facts: Facts, training: Training) -> Iterator[Finding]:
    """Parameters that get gradients and that no optimizer holds; told once, with the main optimizer."""
    told = training.journal.named("unoptimized")
    if not told or training is not _first(facts, training):
        return
    names = tuple(short_name(n) for n in texts(told[-1].data.get("params")))
    lost = whole(told[-1].data.get("count"), len(names)) or len(names)
    if lost:
        yield finding(
            "unoptimized",
            "warning",
            f"{count(lost, 'parameter gets a gradient and is', 'parameters get a gradient and are')} in no optimizer",
            f"{named(names, lost)}: no step changes {'it' if lost == 1 else 'them'}.",
            parameters=names,
            line=_line(facts, "unoptimized"),
            script=_script(facts),
            measured={"parameters": lost},
        )


def skipped(facts: Facts, training: Training) -> Iterator[Finding]:
    """Steps that the loss scaler skipped, beyond the few with which it finds its scale."""
    lost, done = training.skipped, training.steps
    if lost < 10 or lost <= 0.1 * (lost + done):
        return
    share = percent(lost / (lost + done))
    if done <= lost and lost >= 20:
        yield finding(
            "skipped-most",
            "error",
            f"{share} of the steps were skipped by {training.who_skips}",
            f"{lost} skipped, {done} taken: gradients overflow.",
            measured={"skipped": lost, "taken": done},
        )
    elif done >= STEPS_TO_JUDGE:
        yield finding(
            "skipped-steps",
            "warning",
            f"{share} of the steps were skipped by {training.who_skips}",
            f"{lost} skipped, {done} taken. In a sound training one step in thousands is.",
            measured={"skipped": lost, "taken": done},
        )


def loss(facts: Facts, training: Training) -> Iterator[Finding]:
    """A loss that blew up; one that stays where it was is worth a note, no more."""
    if training.nonfinite is not None and training.nonfinite.lasting:
        return
    seen = trend(training)
    if seen is None or training.steps < 20:
        return
    path = f"{number(seen.first)} → {number(seen.last)}"
    if seen.kind == "blew_up":
        grown = _norm_growth(training)
        # a critic's loss grows with the returns it learns: in a game only gradients that grow too are evidence
        if len(facts.players) > 1 and grown < 100:
            return
        yield finding(
            "loss-blew-up",
            "error" if grown >= 100 else "warning",
            f"The loss blew up: {path}, beyond its first range from step {seen.since} on",
            f"The gradient norm grew {number(grown)} times." if grown > 1 else "",
            confidence=0.9 if grown >= 100 else 0.6,
            measured={"first": seen.first, "last": seen.last, "step": seen.since},
        )
    elif seen.kind == "flat" and len(facts.players) == 1:
        yield finding(
            "loss-flat",
            "note",
            f"The loss does not fall: {path} over {count(training.steps, 'step')}",
            "A model that is already trained, a game and a policy gradient look like this too.",
            confidence=0.4,
            measured={"first": seen.first, "last": seen.last},
        )


def updates(facts: Facts, training: Training) -> Iterator[Finding]:
    """How far one step moves the matrices; vectors born at zero move far in every healthy model and are not judged."""
    rows = training.late_rows
    if _is_rate_zero(training):
        late = bool(rows)  # a first epoch may have a rate of 0 on purpose
        yield finding(
            "learning-rate-zero",
            "error" if late else "warning",
            f"The learning rate was 0 in all of {count(training.steps, 'step')}"
            if late
            else f"The learning rate was 0 in each of the {len(training.rows)} steps that were sampled",
            "No weight was changed." if late else f"{count(training.steps, 'step')} were taken.",
            measured={"learning_rate": 0.0},
        )
        return
    if training.steps < STEPS_TO_JUDGE or len(rows) < ROWS_TO_JUDGE or training.nonfinite is not None:
        return
    peak = max((max(r.lr) for r in training.rows if r.lr), default=0.0)
    # the end of a schedule is slow on purpose: only rows at a tenth of the peak or more are judged
    lively = [r for r in rows if not r.lr or max(r.lr) >= 0.1 * peak]
    if len(lively) < ROWS_TO_JUDGE:
        return
    ratios = training.ratios(lively)
    if len(ratios) < 2:
        return
    fast = sorted(((u, i) for i, u in ratios.items() if u >= QUICK), reverse=True)
    slow = sorted((u, i) for i, u in ratios.items() if 0 < u < SLOW)
    if 2 * len(fast) > len(ratios):
        wild = median(u for u, _ in fast) >= FAST
        seen = trend(training)
        learning = seen is not None and seen.kind == "falls"
        yield finding(
            "update-too-large",
            "warning" if wild and not learning else "note",
            f"{len(fast)} of {len(ratios)} weight matrices move more than {percent(QUICK)} of their own size a step",
            f"Largest: {', '.join(f'{training.name(i)} {percent(u)}' for u, i in fast[:2])}.",
            confidence=0.6,
            parameters=tuple(training.name(i) for _, i in fast[:50]),
            measured={"update_to_weight": fast[0][0]},
        )
    elif 2 * len(slow) > len(ratios):
        typical = slow[len(slow) // 2][0]
        yield finding(
            "update-too-small",
            "warning",
            f"{len(slow)} of {len(ratios)} weight matrices hardly move: a step changes {number(typical)} of them",
            "That is below the resolution of float32, so most of it rounds to nothing.",
            confidence=0.7,
            parameters=tuple(training.name(i) for _, i in slow[:50]),
            measured={"update_to_weight": typical},
        )


def _is_rate_zero(training: Training) -> bool:
    """Whether every sampled step had a rate of exactly 0 and moved nothing."""
    rows = training.rows
    if training.steps < STEPS_FOR_A_FACT or len(rows) < 3:
        return False
    moved = any(u is not None and u != 0.0 for r in rows for u in r.u)  # an optimizer may have rates of its own
    return all(r.lr and max(r.lr) == min(r.lr) == 0.0 for r in rows) and not moved


def stall(facts: Facts, training: Training) -> Iterator[Finding]:
    """Updates of 16-bit weights that round to nothing."""
    told = [e for e in training.journal.named("stall") if e.o in (None, training.id)]
    if not told:
        return
    names = tuple(short_name(n) for n in texts(told[-1].data.get("params")))
    lost = whole(told[-1].data.get("count"), len(names))
    share = real(told[-1].data.get("share"))
    if not lost:
        return
    part = "most" if share is None else percent(share)
    told_of = finding(
        "bf16-stall",
        "warning" if share is None or share >= 0.5 else "note",
        f"In {lost} of {count(training.tensors, '16-bit tensor')} {part} of the updates round to nothing",
        f"{named(names, lost)}: a step is smaller than half of the gap between neighbouring 16-bit numbers.",
        parameters=names,
        measured=None if share is None else {"share": share},
    )
    yield replace(told_of, primary=step_line(facts, training))


def vanished(facts: Facts, training: Training) -> Iterator[Finding]:
    """Gradients too small to matter beside the others: through deep saturated nets they underflow layer by layer."""
    names = _vanished(training)
    if names:
        matrices = sum(training.is_matrix(i) for i in training.seen)
        yield finding(
            "gradients-vanish",
            "warning",
            f"Gradients vanish: {len(names)} of {matrices} weight matrices get less than a millionth of the largest",
            f"{named(names, len(names))}.",
            confidence=0.7,
            parameters=names,
            measured={"matrices": len(names)},
        )


def _vanished(training: Training) -> tuple[str, ...]:
    if training.steps < STEPS_TO_JUDGE or len(training.late_norms) < NORMS_TO_JUDGE or training.nonfinite is not None:
        return ()
    norms = {i: g for i, g in training.norms(training.late_norms).items() if training.is_matrix(i)}
    gone = [i for i, g in norms.items() if g < VANISHED * max(norms.values())]
    # a norm of 0 is an underflow only where its neighbours show one coming
    fading = sum(norms[i] > 0 for i in gone)
    return tuple(training.name(i) for i in gone) if fading >= 2 and len(gone) >= max(4, len(norms) / 4) else ()


def all_zero(facts: Facts, training: Training) -> Iterator[Finding]:
    """Every gradient of every measured step is exactly zero: steps are taken and nothing is learned."""
    if not training.is_all_zero:
        return
    # a rank may hold nothing but empty shards
    others = [t for _, found in facts.by_rank for t in found if t.id == training.id]
    if all(t.is_all_zero or not t.measured for t in others):
        alone = len(facts.trainings) == 1
        yield finding(
            "gradients-all-zero",
            "error" if alone and training.steps >= STEPS_FOR_A_FACT else "warning",
            f"All gradients were exactly zero in every measured step{_who(facts, training)}",
            f"{count(training.steps, 'step')} of {training.record.cls or 'the optimizer'} "
            "followed no gradient: the loss does not depend on the weights.",
            line=_line(facts, "gradients-all-zero"),
            script=_script(facts),
            measured={"steps": training.steps},
        )


def zeros(facts: Facts, training: Training) -> Iterator[Finding]:
    """Gradients that are exactly zero to the end."""
    if training.steps < 20 or training.nonfinite is not None or training.is_all_zero or _vanished(training):
        return
    if any(b.loss is not None and b.loss[1] == 0.0 for b in training.losses[-3:]):
        return  # a hinge loss of 0 has nothing left to say
    tail = max(20, training.steps // 5)
    steps = [step for step, _ in training.measured]
    looked, whole_run = sum(step > training.steps - tail for step in steps), len(steps) >= ROWS_TO_JUDGE
    quiet = {i: since for i, since in training.zero_since.items() if training.steps - since + 1 >= tail}
    # what is born at zero holds its neighbours at zero for a step or two, so "always" begins with the third
    meant = training.kept_away("zero")
    quiet = {i: s for i, s in quiet.items() if i not in meant and (looked >= 6 or (s <= 3 and whole_run))}
    if not quiet:
        return
    since = max(quiet.values())
    names = tuple(training.name(i) for i in sorted(quiet))
    yield finding(
        "gradients-zero",
        "warning" if any(training.is_matrix(i) for i in quiet) else "note",
        f"{len(quiet)} of {training.tensors} tensors have a gradient of exactly zero"
        + (" in every step" if since <= 3 else f" since step {since}"),
        f"{named(names, len(quiet))}: the loss no longer depends on {'it' if len(quiet) == 1 else 'them'}.",
        confidence=0.8,
        parameters=names,
        line=_line(facts, "gradients-zero"),
        script=_script(facts),
        measured={"tensors": len(quiet), "step": since},
    )


def dead(facts: Facts, training: Training) -> Iterator[Finding]:
    """Gradients most of whose entries are zero."""
    shares = [r.dead for r in training.late_rows if r.dead is not None and math.isfinite(r.dead)]
    if training.steps >= STEPS_TO_JUDGE and len(shares) >= ROWS_TO_JUDGE and median(shares) >= 0.8:
        yield finding(
            "dead-gradients",
            "note",
            f"{percent(median(shares))} of the gradient's entries are exactly zero",
            "Sampled over all tensors. A large embedding looks like this; so do dead ReLUs.",
            confidence=0.4,
            measured={"share": median(shares)},
        )


def clipped(facts: Facts, training: Training) -> Iterator[Finding]:
    """A clip that works on nearly every step sets the step size, which is worth knowing."""
    found = training.clipping()
    if found is None or found[0] < 100:
        return
    calls, hit, limit, mean = found
    if hit >= 0.9 * calls:
        yield finding(
            "clipped-always",
            "note",
            f"{percent(hit / calls)} of the steps were clipped",
            f"The limit is {number(limit)}, the mean norm before it {number(mean)}: the clip sets the step size.",
            confidence=0.8,
            measured={"share": hit / calls, "limit": limit, "mean_norm": mean},
        )


def accumulation(facts: Facts, training: Training) -> Iterator[Finding]:
    """Several backwards a step, as observed."""
    told = [e for e in training.journal.named("accumulation") if e.o in (None, training.id)]
    if not told or training is not facts.training or "LBFGS" in training.record.cls:
        return  # LBFGS calls its closure several times a step and adds nothing up
    each = whole(told[-1].data.get("microbatches"), 0)
    if each > 1:
        since = told[-1].n or 1
        yield finding(
            "accumulation",
            "note",
            f"{each} backward passes before each step" + (f" since step {since}" if since > 1 else ""),
            "The loss is shown as each of them was passed to backward.",
            measured={"microbatches": each},
        )


RULES: tuple[Callable[[Facts, Training], Iterator[Finding]], ...] = (
    nonfinite,
    never_reached,
    unoptimized,
    skipped,
    loss,
    updates,
    stall,
    vanished,
    all_zero,
    zeros,
    dead,
    clipped,
    accumulation,
)


def _first(facts: Facts, training: Training) -> Training:
    return next(found[0] for journal, found in facts.by_rank if journal is training.journal)


def _norm_growth(training: Training) -> float:
    totals = [b.norm[0] for b in training.blocks if b.norm is not None and math.isfinite(b.norm[0])]
    if len(totals) < 4:
        totals = [r.tot for r in training.rows if r.tot is not None and math.isfinite(r.tot)]
    if len(totals) < 4:
        return 0.0
    edge = max(1, len(totals) // 10)
    first = median(totals[:edge])
    return median(totals[-edge:]) / first if first > 0 else 0.0


def _line(facts: Facts, line: str) -> str:
    """Which line of the table of fixes, where `gradctl explain` goes on from here: a notebook is no script."""
    record = facts.record
    notebook = record is not None and record.script in _NO_SCRIPT and record.start == "record"
    return "no-script" if notebook and line != "nonfinite-skipped" else line


def _script(facts: Facts) -> str:
    return short_name(command(facts.record)) or "train.py"


def _who(facts: Facts, training: Training) -> str:
    """Which optimizer or rank, where a sentence could mean several."""
    words: list[str] = []
    if len(facts.players) > 1:
        words.append(f"{training.record.cls or 'optimizer'} {training.id}")
    if facts.several and training.journal is not facts.main:
        words.append(f"rank {training.journal.rank}")
    return f" ({', '.join(words)})" if words else ""
