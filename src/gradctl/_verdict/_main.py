"""Which process and which optimizer a run is about, when it has several."""

from __future__ import annotations

from collections.abc import Sequence

from gradctl._journal import Journal, Run
from gradctl._verdict._training import Training, trainings


def rank_journals(run: Run) -> tuple[Journal, ...]:
    """Return one journal a rank: the program's own processes, or the children it trains in (`mp.spawn`)."""
    if any(trainings(j) for j in run.ranks):
        return run.ranks
    trained = [j for j in run.children if trainings(j)]
    if not trained:
        return run.ranks or run.children[:1]
    found: dict[int, Journal] = {}
    for journal in trained:
        rank = journal.run.rank if journal.run else journal.rank
        held = found.get(rank)
        if held is None or _weight(journal) > _weight(held):
            found[rank] = journal
    return tuple(found[rank] for rank in sorted(found))


def main_journal(ranks: Sequence[Journal]) -> Journal | None:
    """Return the journal of the lowest rank that trained, else the first."""
    return next((j for j in ranks if trainings(j)), ranks[0] if ranks else None)


def main_training(found: Sequence[Training]) -> tuple[Training | None, tuple[Training, ...]]:
    """Choose the optimizer that a run is about, and those that step together with it.

    The main one has the largest product of steps and elements. Optimizers with the same number of steps of which one
    alone sees a backward (one optimizer a stage, or one a parameter) are stages of one training: that one leads, for
    the losses are with it, and its size is theirs together. Two players of a game each have backwards of their own.

    Returns:
        The main optimizer (None if there is none), and the stages with the main one first.
    """
    groups: list[tuple[Training, ...]] = []
    left = list(found)
    while left:
        one = left.pop(0)
        same = [t for t in left if abs(t.steps - one.steps) <= 1 and t.record.source == one.record.source]
        together = [one, *same]
        leaders = [t for t in together if t.microbatches > 0]
        if len(together) > 1 and len(leaders) == 1:
            leader = leaders[0]
            groups.append((leader, *(t for t in together if t is not leader)))
            left = [t for t in left if not any(t is s for s in same)]
        else:
            groups.append((one,))
    if not groups:
        return None, ()
    best = max(groups, key=lambda group: sum(t.weight for t in group))
    return best[0], best


def _weight(journal: Journal) -> int:
    return sum(t.weight for t in trainings(journal))
