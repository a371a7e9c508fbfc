"""What is said about a run as a whole: where its time and memory go, whether its ranks agree, what recording missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from gradctl._results import Finding
from gradctl._verdict._facts import Facts
from gradctl._verdict._fixes import finding
from gradctl._verdict._health import STEPS_TO_JUDGE
from gradctl._verdict._training import Training, field, short_name, whole
from gradctl._verdict._words import count, milliseconds, percent, seconds, size

SAVED_SHARE = 0.3
SAVED_BYTES = 16 << 20
DATA_SHARE = 0.3
LATE_SHARE = 0.1
LATE_MS = 0.5


@dataclass(frozen=True)
class Lateness:
    """How late one rank reaches the exchange of gradients.

    Args:
        rank: the rank.
        late_ms: by how much its work outside backward exceeds that of the median of the others, each step.
        share: `late_ms` over the time of a step.
    """

    rank: int
    late_ms: float
    share: float


def lateness(facts: Facts) -> Lateness | None:
    """Find the late rank: it spends longer outside backward, and the others wait for it inside theirs."""
    times: list[tuple[int, float, float, float]] = []
    for journal, found in facts.by_rank:
        training = next((t for t in found if facts.training and t.id == facts.training.id), None)
        if training is None or training.steps < STEPS_TO_JUDGE:
            continue
        blocks = [b for b in training.blocks if b.n > 3 and b.step_ms > 0]
        if blocks:
            step = median(b.step_ms for b in blocks)
            backward = median(b.backward_ms for b in blocks)
            rest = median(b.step_ms - b.backward_ms - b.optimizer_ms for b in blocks)
            times.append((journal.rank, step, backward, rest))
    if len(times) < 2:
        return None
    rank, step, backward, rest = max(times, key=lambda row: row[3])
    others = [row for row in times if row[0] != rank]
    late = rest - median(row[3] for row in others)
    waited = median(row[2] for row in others) - backward
    if step <= 0 or late < max(LATE_MS, LATE_SHARE * step) or waited < 0.5 * late:
        return None
    return Lateness(rank, late, late / step)


def late_rank(facts: Facts) -> Iterator[Finding]:
    """One rank that the others wait for."""
    found = lateness(facts)
    if found is not None:
        yield finding(
            "late-rank",
            "warning" if found.share >= 0.3 else "note",
            f"Rank {found.rank} is late by {milliseconds(found.late_ms)} in every step ({percent(found.share)} of it)",
            "The other ranks wait for it inside backward.",
            rank=str(found.rank),
            confidence=0.7,
            measured={"late_ms": found.late_ms, "share": found.share},
        )


def rank_steps(facts: Facts) -> Iterator[Finding]:
    """Ranks of one training that took different numbers of steps."""
    main = facts.training
    if main is None or not facts.several:
        return
    taken = {
        journal.rank: t.steps
        for journal, found in facts.by_rank
        for t in found
        if journal.end is not None and t.record.cls == main.record.cls and t.record.numel == main.record.numel
    }
    if len(taken) < 2 or len(set(taken.values())) == 1:
        return
    low, high = min(taken, key=lambda r: taken[r]), max(taken, key=lambda r: taken[r])
    yield finding(
        "rank-steps-differ",
        "warning",
        f"Rank {low} took {count(taken[low], 'step')}, rank {high} took {taken[high]}",
        "Ranks that average their gradients must take the same steps, or one waits for ever.",
        confidence=0.7,
        measured={"fewest": taken[low], "most": taken[high]},
    )


def rank_gradients(facts: Facts) -> Iterator[Finding]:
    """Under data-parallel training, gradients that are not the same on all ranks.

    Only where the data-parallel wrapper was seen: shards and stages differ by design.
    """
    main = facts.training
    if main is None or not facts.several or not all(j.named("ddp") for j in facts.ranks):
        return
    mine = {r.n: r.g for r in main.rows}
    for journal, found in facts.by_rank:
        other = next((t for t in found if t.id == main.id and t.record.names == main.record.names), None)
        if journal is facts.main or other is None:
            continue
        shared = [(r.n, mine[r.n], r.g) for r in other.rows if r.n in mine]
        apart = [n for n, a, b in shared if _differ(a, b)]
        if len(apart) >= 3 and 2 * len(apart) >= len(shared):
            yield finding(
                "ranks-differ",
                "warning",
                f"Ranks {main.journal.rank} and {journal.rank} use different gradients, first at step {min(apart)}",
                f"In {len(apart)} of {len(shared)} steps that both sampled, most norms differ by more than 12 %.",
                confidence=0.8,
                measured={"step": min(apart), "steps": len(apart)},
            )
            return


def _differ(a: tuple[float | None, ...], b: tuple[float | None, ...]) -> bool:
    pairs = [(x, y) for x, y in zip(a, b, strict=False) if x and y and math.isfinite(x) and math.isfinite(y)]
    return bool(pairs) and 2 * sum(abs(math.log10(x / y)) > 0.05 for x, y in pairs) > len(pairs)


def saved_by_one(facts: Facts) -> Iterator[Finding]:
    """One place that keeps a large part of what backward remembers."""
    saved = facts.main.saved[-1] if facts.main and facts.main.saved else None
    if saved is None or not saved.rows or saved.total < SAVED_BYTES:
        return
    top = max(saved.rows, key=lambda row: row.bytes)
    if top.bytes < SAVED_SHARE * saved.total:
        return
    by_line = saved.method == "hooks"
    share = percent(min(1.0, top.bytes / saved.total))
    place = short_name(top.where) + (f" in {short_name(top.module)}" if top.module else "")
    yield finding(
        "saved-by-one",
        "note",
        f"One {'line' if by_line else 'operation'} keeps {share} of what backward remembers",
        f"{place} keeps {size(top.bytes)} of {size(saved.total)}.",
        where=short_name(top.module or top.where),
        measured={"bytes": top.bytes, "total": saved.total},
    )


def data_loader(facts: Facts) -> Iterator[Finding]:
    """A training that waits for its data."""
    training: Training | None = facts.training
    times = training.milliseconds() if training else None
    if training is None or times is None or training.steps < STEPS_TO_JUDGE:
        return
    step, _, _, data = times
    waited = data * training.steps / 1000
    if data < DATA_SHARE * step or waited < 1.0:
        return
    yield finding(
        "data-loader",
        "warning" if data >= 0.6 * step and waited >= 60 else "note",
        f"{percent(min(1.0, data / step))} of a step is spent waiting for the data loader",
        f"{milliseconds(data)} of {milliseconds(step)}; {seconds(waited)} in the whole run.",
        measured={"share": data / step, "seconds": waited},
    )


def torn_steps(facts: Facts) -> Iterator[Finding]:
    """Steps whose forward overlapped a turn of the process-wide switch."""
    torn = [e for j in facts.run.journals for e in j.named("torn_step")]
    if torn:
        site = field(torn[0].data, "site")
        yield finding(
            "torn-step",
            "warning",
            f"{count(len(torn), 'training step')} overlapped a turn of gradctl.off",
            f"Gradients may be partial. First: {site}." if site else "Gradients may be partial.",
        )


def recorder(facts: Facts) -> Iterator[Finding]:
    """Faults of ours, and what was switched off because of them."""
    off = [e for j in facts.run.journals for e in j.named("tier_off")]
    faults = sum(j.end.faults if j.end else len(j.named("fault")) for j in facts.run.journals)
    if not off and not faults:
        return
    first = next((e for j in facts.run.journals for e in j.named("fault")), None)
    where = f"First at {short_name(field(first.data, 'where'))}. " if first and field(first.data, "where") else ""
    what = "; ".join(dict.fromkeys(f"{e.data.get('tier', '?')}: {short_name(str(e.data.get('why', '')))}" for e in off))
    yield finding(
        "recorder-fault",
        "note",
        f"The recorder had {count(faults, 'fault')}" + (" and switched a part of itself off" if off else ""),
        f"{where}{short_name('Off: ' + what + '.') if what else ''} The script was not touched.".strip(),
    )


def journal_file(facts: Facts) -> Iterator[Finding]:
    """Lines that could not be read, and journals of a newer version."""
    bad = sum(j.bad_lines for j in facts.run.journals)
    if bad:
        yield finding(
            "journal-damaged",
            "note",
            f"{count(bad, 'line')} of the journal could not be read",
            "They are left out of everything here.",
            measured={"lines": bad},
        )
    newer = [j for j in facts.run.journals if j.newer]
    if newer:
        schema = newer[0].run.schema if newer[0].run else "?"
        yield finding(
            "journal-newer",
            "note",
            f"The journal was written by a newer gradctl ({short_name(schema)})",
            "What this version understands is shown; the rest is not.",
        )


def never_stepped(facts: Facts) -> Iterator[Finding]:
    """An optimizer that was made and whose step() was never called although backwards were run."""
    if facts.failure is not None or facts.record is None or facts.record.grad == "off":
        return  # a script that failed between its first backward and its first step has forgotten nothing
    stepped = any(t.record.source == "optimizer" for _, found in facts.by_rank for t in found)
    for journal in facts.ranks:
        for event in journal.named("never_stepped"):
            backwards = whole(event.data.get("backwards"), 0)
            if not backwards:
                continue
            severity = "note" if stepped else "error" if backwards >= 3 else "warning"
            cls = short_name(field(event.data, "cls")) or "An optimizer"
            yield finding(
                "never-stepped",
                severity,
                f"{cls} was made and never stepped"
                + ("" if stepped else f": {count(backwards, 'backward pass', 'backward passes')} changed nothing"),
                "Other optimizers did step." if stepped else "Gradients were computed and never used.",
                measured={"backwards": backwards},
            )
            return


def not_seen(facts: Facts) -> Iterator[Finding]:
    """Training that happened where it could not be recorded."""
    if facts.training is not None or facts.record is None or facts.record.grad == "off" or facts.failure is not None:
        return  # a script that failed before its first step has hidden nothing
    if any(True for _ in never_stepped(facts)):
        return  # that is the reason, and it is told
    for what, why in missed(facts)[:1]:
        yield finding(
            "not-seen",
            "warning",
            f"Training was not seen: {what}",
            why,
        )


def missed(facts: Facts) -> list[tuple[str, str]]:
    """Everything that the journals say was not seen, each thing once."""
    found: dict[tuple[str, str], None] = {}
    for journal in facts.run.journals:
        for event in journal.named("not_seen"):
            found.setdefault((short_name(field(event.data, "what")), field(event.data, "why")))
        for what, why in journal.end.not_seen if journal.end else ():
            found.setdefault((short_name(what), why))
    return list(found)


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    never_stepped,
    not_seen,
    torn_steps,
    rank_steps,
    rank_gradients,
    late_rank,
    data_loader,
    saved_by_one,
    recorder,
    journal_file,
)
