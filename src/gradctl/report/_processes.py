"""The other processes and optimizers of a run: a row a rank, and what trained beside the main one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradctl._journal import Journal, Run
from gradctl.report._axes import count_text, short
from gradctl.report._series import Curve, Floats, TimeSplit, time_split, trace
from gradctl.report._svg import shortened, spark_data


@dataclass(frozen=True, slots=True)
class RankRow:
    """One process of a run that has several."""

    rank: int
    process: str
    steps: str
    ended: str
    split: TimeSplit | None
    step: str
    loss: str
    deviation: str
    late: bool


def ranks(journals: Sequence[Journal], optimizers: Sequence[int], late: int | None) -> tuple[RankRow, ...]:
    """Return one row a rank when there are several.

    Args:
        journals: one a rank.
        optimizers: ids of the optimizers that the page is about.
        late: the rank that the others wait for, if there is one.
    """
    by_rank: dict[int, Journal] = {}
    for journal in journals:
        number = journal.run.rank if journal.run and journal.is_child else journal.rank
        by_rank.setdefault(number, journal)
    world = max((j.run.world_size for j in by_rank.values() if j.run), default=1)
    if len(by_rank) < 2 and world < 2:
        return ()
    traces = {number: trace(journal, _stepping(journal, optimizers)) for number, journal in sorted(by_rank.items())}
    deviations = _deviations({number: seen.loss for number, seen in traces.items()})
    rows: list[RankRow] = []
    for number in sorted({*traces, *range(min(world, 64))}):
        journal, seen = by_rank.get(number), traces.get(number)
        if journal is None or seen is None:
            rows.append(RankRow(number, "", "", "left no journal", None, "", "", "", False))
            continue
        split = time_split(seen.blocks)
        rows.append(
            RankRow(
                rank=number,
                process=f"{journal.run.host} · pid {journal.pid}"
                if journal.run and journal.run.host
                else f"pid {journal.pid}",
                steps=count_text(seen.last_step),
                ended=ended(journal),
                split=split,
                step=f"{split.step:.1f}" if split else "",
                loss=short(seen.loss.last) if seen.loss.seen else "",
                deviation=deviations.get(number, ""),
                late=number == late,
            )
        )
    return tuple(rows)


def _stepping(journal: Journal, optimizers: Sequence[int]) -> Sequence[int]:
    if any(o in journal.optimizers for o in optimizers[:1]):
        return optimizers
    return sorted(journal.optimizers, key=lambda o: -journal.optimizers[o].numel)[:1]


def _deviations(losses: dict[int, Curve]) -> dict[int, str]:
    curves = {number: curve for number, curve in losses.items() if curve.seen}
    if len(curves) < 2:
        return {}
    first = max(float(c.x[0]) for c in curves.values())
    last = min(float(c.x[-1]) for c in curves.values())
    if last < first:
        return {}
    grid = np.linspace(first, last, 200)
    table: dict[int, Floats] = {}
    for number, curve in curves.items():
        good = np.isfinite(curve.y)
        table[number] = np.interp(grid, curve.x[good], np.clip(curve.y[good], -1e150, 1e150))
    centre = np.mean(list(table.values()), axis=0)
    scale = float(np.mean(np.abs(centre)))
    found: dict[int, str] = {}
    for number, values in table.items():
        apart = float(np.mean(values - centre)) / scale * 100 if scale > 0 else 0.0
        found[number] = f"{apart:+.1f} %".replace("-", "−") if abs(apart) < 1e4 else "far off"
    return found


@dataclass(frozen=True, slots=True)
class OtherRow:
    """An optimizer or a child process that the page is not about."""

    what: str
    modules: str
    tensors: str
    steps: str
    loss: str
    norm: str
    spark: str


def others(run: Run, main: Journal | None, optimizers: Sequence[int], ranks: Sequence[Journal]) -> tuple[OtherRow, ...]:
    """Return the main journal's other optimizers, then the children that trained something and are no rank."""
    if main is None:
        return ()
    rows = [_other(main, o, "") for o in sorted(main.optimizers) if o not in optimizers]
    for child in run.children:
        if child not in ranks:
            rows += [_other(child, o, f" in child {child.pid}") for o in sorted(child.optimizers)[:4]]
    return tuple(rows[:40])


def _other(journal: Journal, o: int, where: str) -> OtherRow:
    seen = trace(journal, [o])
    record = seen.optimizers[0]
    curve = seen.norm.thinned(36, max(1, seen.last_step))
    points = [math.log10(v) if v > 0 else math.nan for v in (float(v) for v in curve.y)]
    return OtherRow(
        what=f"{'backwards, no optimizer' if seen.by_backward else record.cls or 'optimizer'}{where}",
        modules=", ".join(shortened(name, 60) for name, _ in record.roots[:3]),
        tensors=count_text(len(seen.names)),
        steps=count_text(seen.last_step),
        loss=f"{short(seen.loss.first)} → {short(seen.loss.last)}" if seen.loss.seen else "–",
        norm=f"{short(seen.norm.first)} → {short(seen.norm.last)}" if seen.norm.seen else "–",
        spark=spark_data(points, 90, 18),
    )


def ended(journal: Journal) -> str:
    """Say how a process ended: `exit 0`, `ValueError, exit 1`, `no end record`."""
    end = journal.end
    if end is None:
        return "no end record"
    if end.exc:
        name = shortened(str(end.exc.get("type") or "exception"), 60)
        return f"{name}, exit {end.code}" if end.code is not None else name
    if end.how == "stopped":
        return "recording stopped"
    return f"exit {end.code}" if end.code is not None else "exit code not known"
