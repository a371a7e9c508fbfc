"""history_kept: graphs of past steps that something still holds."""

from __future__ import annotations

from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context, count
from gradctl._explain._holding import Holder, stored_at
from gradctl._lineage import Kept, Site

_FEW = 4


def history_kept(context: Context) -> Iterable[Candidate]:
    """Find values that keep the graphs of more and more steps alive."""
    grouped: dict[Site, tuple[Kept, bool]] = {}
    for kept in context.facts.kept.values():
        everything = kept.count >= kept.seen_at - 1 - kept.oldest and kept.count >= _FEW
        if (kept.held is not None and kept.held.bounded) or not (kept.grown or everything):
            continue
        made = kept.node.site
        stored = None
        if kept.held is not None:
            holder = Holder("container", kept.held.name, kept.held.owner, kept.held.code)
            stored = stored_at(holder, kept.node, kept.node.stack)
        line = stored or made
        if line is not None and (line not in grouped or kept.count > grouped[line][0].count):
            grouped[line] = (kept, stored is not None or kept.chained)
    for line, (kept, sure) in grouped.items():
        name = kept.held.name if kept.held is not None else "it"
        yield Candidate(
            "history_kept",
            line,
            f"the graphs of {count(kept.count, 'backward')} were alive at once, and more with every step",
            "each value made here holds the one before it"
            if kept.chained
            else f"{name} keeps values with their history",
            confidence=0.9 if sure else 0.75,
            severity="warning",
            evidence=((kept.node.site, "made"),),
            explains="memory",
            measured={"graphs": float(kept.count)},
        )
