"""What stands beside the chart of a run: time, saved bytes, agreement of steps, ranks, other optimizers, the footer."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

import numpy as np
from markupsafe import Markup

from gradctl._journal import Journal, Run
from gradctl.report._axes import Scale, bytes_text, count_text, seconds_text, step_ticks
from gradctl.report._processes import ended
from gradctl.report._series import Trace
from gradctl.report._svg import element, line, text

MOST_PLACES = 8
ENOUGH_PAIRS = 20
"""Cosines scatter by 0.2: a median of fewer than this many says nothing."""
MOST_DOTS = 400
FEWEST_PAIRS = 6


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes kept for backward by one line or one op."""

    where: str
    function: str
    modules: str
    count: int
    size: str
    share: float


@dataclass(frozen=True, slots=True)
class SavedTable:
    """What backward remembers: the largest places, and the rest in one row."""

    total: str
    step: int
    by_line: bool
    places: tuple[Place, ...]
    rest: Place | None


def saved_table(journal: Journal) -> SavedTable | None:
    """Return what backward remembered at the last step that was looked at, lines before ops."""
    if not journal.saved:
        return None
    saved = max(journal.saved, key=lambda s: (s.method == "hooks", s.n))
    places: dict[str, tuple[int, int, list[str]]] = {}
    for row in saved.rows:
        size, count, modules = places.get(row.where, (0, 0, []))
        pattern = collapsed(row.module) if row.module else ""
        pattern = "" if set(pattern) <= {"*", "."} else pattern  # layers that have numbers and no names
        if pattern and pattern not in modules:
            modules.append(pattern)
        places[row.where] = (size + row.bytes, count + row.count, modules)
    ordered = sorted(places.items(), key=lambda item: -item[1][0])
    largest = max((size for _, (size, _, _) in ordered), default=0) or 1
    ordered = [item for item in ordered if item[1][0] > 0]
    shown = tuple(
        _place(where, size, count, modules, largest, saved.method == "hooks")
        for where, (size, count, modules) in ordered[:MOST_PLACES]
    )
    left = ordered[MOST_PLACES:]
    size = max(0, saved.total - sum(s for _, (s, _, _) in ordered[:MOST_PLACES]))
    rest = None
    if size > 0 and (left or size > 0.005 * saved.total):
        noun = ("line" if saved.method == "hooks" else "op") + ("s" if len(left) != 1 else "")
        count = max(0, saved.count - sum(c for _, (_, c, _) in ordered[:MOST_PLACES]))
        rest = Place(
            f"{len(left)} more {noun}" if left else "the rest",
            "",
            "",
            count,
            bytes_text(size),
            round(min(1.0, size / largest) * 100, 1),
        )
    return SavedTable(bytes_text(saved.total), saved.n, saved.method == "hooks", shown, rest)


def collapsed(name: str) -> str:
    """Replace the numbers of a module path by `*`: `h.11.mlp` becomes `h.*.mlp`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _place(where: str, size: int, count: int, modules: list[str], largest: int, by_line: bool) -> Place:
    head, _, function = where.partition(" ") if by_line else (where, "", "")
    names = ", ".join(modules[:2]) + (f" +{len(modules) - 2}" if len(modules) > 2 else "")
    return Place(head, function, names, count, bytes_text(size), round(size / largest * 100, 1))


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether neighbouring steps pull the same way: a picture, and one plain sentence."""

    svg: Markup
    sentence: str


def agreement(seen: Trace) -> Agreement | None:
    """Draw the cosines between gradients of neighbouring steps, or return None when hardly any was sampled."""
    steps, values = (seen.cosine[0], seen.cosine[1]) if seen.cosine.size else (np.empty(0), np.empty(0))
    if len(steps) < FEWEST_PAIRS:
        return None
    late = [float(v) for s, v in zip(steps, values, strict=True) if s > seen.last_step / 2]
    keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_DOTS)).astype(int))
    low = min(-0.1, float(values.min()) - 0.05)
    across, down = Scale(0.5, seen.last_step + 0.5, 44, 506), Scale(low, 1.0, 150, 12)
    parts: list[Markup] = [element("title", "Cosine between the gradients of neighbouring steps, by step")]
    for tick in (1.0, 0.5, 0.0, *((-0.5,) if low < -0.45 else ())):
        y = down(tick)
        parts += [
            line(44, y, 506, y, "axis" if tick == 0 else "grid"),
            text(f"{tick:g}".replace("-", "−"), 34, y + 4, anchor="end"),
        ]
    for tick in step_ticks(seen.last_step):
        end = tick == seen.last_step and seen.last_step > 12
        parts.append(text(count_text(tick), across(float(tick)), 172, anchor="end" if end else "middle"))
    parts += [
        element("circle", cx=across(float(steps[k])), cy=down(float(values[k])), r=2.4, class_="dot") for k in keep
    ]
    svg = element(
        "svg", *parts, class_="chart", viewBox="0 0 516 180", role="img", aria_label="Cosine between neighbouring steps"
    )
    return Agreement(svg, _agreement_sentence(late, len(values)))


def _agreement_sentence(late: Sequence[float], pairs: int) -> str:
    if len(late) < ENOUGH_PAIRS:
        return (
            f"{count_text(pairs)} pairs of neighbouring steps were sampled, {len(late)} of them in the second half."
            " Single values scatter by 0.2: too few to read the batch size from."
        )
    middle = median(late)
    quoted = f"Median cosine {middle:.2f} in the second half".replace("-", "−")
    if middle <= 0.05:
        return (
            f"{quoted}: one step says almost nothing about the next. The noise of a gradient is far above its signal,"
            " and a larger batch averages it away."
        )
    noise = 1 / middle - 1
    if noise < 0.5:
        return f"{quoted}: batches agree already, and a larger one would change little."
    return (
        f"{quoted}: the noise scale is about {noise:.1f} times your batch. Batches up to about that size should still"
        " pay for themselves."
    )


def meta(run: Run, main: Journal | None, ranks_seen: int) -> tuple[str, list[str]]:
    """Return the command, and what else stands in the grey line at the top."""
    if main is None or main.run is None:
        return run.directory.name, ["the journal has no first line"]
    record = main.run
    words = [shlex.quote(word) for word in record.argv or (record.script,)]
    wall = main.end.wall if main.end else max((b.t for b in main.blocks), default=0.0)
    facts = [ended(main), seconds_text(wall) if wall > 0 else "", f"torch {record.torch}" if record.torch else ""]
    facts.append(record.device if record.device not in ("", "cpu") else "")
    if ranks_seen > 1 or record.world_size > 1:
        facts.append(f"{max(ranks_seen, record.world_size)} ranks")
    if record.started > 0:
        try:
            facts.append(f"{datetime.fromtimestamp(record.started, UTC):%Y-%m-%d %H:%M} UTC")
        except (OverflowError, OSError, ValueError):  # a hostile or broken journal may name any second
            facts.append("at an unknown time")
    return " ".join(words), [fact for fact in facts if fact]


@dataclass(frozen=True, slots=True)
class Footer:
    """What recording cost, what was not seen, where the journal is, and how to draw the page again."""

    cost: str
    not_seen: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    redraw: str
    version: str


def footer(run: Run, main: Journal | None) -> Footer:
    """Collect the footer over all journals of the run."""
    gaps: dict[tuple[str, str], None] = {}
    for journal in run.journals:
        end = journal.end
        for what, why in end.not_seen if end else ():
            gaps[(what, why)] = None
        for event in journal.named("not_seen"):
            gaps[(str(event.data.get("what", "")), str(event.data.get("why", "")))] = None
        for event in journal.named("tier_off"):
            gaps[
                (
                    f"the recorder's part “{event.data.get('tier', '')}”",
                    f"it switched itself off: {event.data.get('why', '')}",
                )
            ] = None
        if journal.run is None and not journal.blocks:
            gaps[(journal.path.name, "the journal is empty")] = None
        elif end is None:
            gaps[
                (f"how process {journal.pid} ended", "its journal has no end record: it was killed, or it still runs")
            ] = None
        if journal.bad_lines:
            gaps[(f"{count_text(journal.bad_lines)} lines of {journal.path.name}", "they could not be read")] = None
        if journal.cut:
            gaps[(f"the last line of {journal.path.name}", "it is cut; the process stopped while writing")] = None
        if journal.newer:
            gaps[(f"parts of {journal.path.name}", "a newer version of gradctl wrote it")] = None
        dropped = sum(end.dropped.values()) if end else 0
        if dropped and end:
            names = ", ".join(f"{count_text(n)} {name}" for name, n in list(end.dropped.items())[:4])
            gaps[(f"{names} events", "of each kind the first 200 are kept")] = None
        if journal.run and journal.run.grad == "off":
            gaps[("gradients", "they were switched off for the whole process")] = None
    files = [journal.path.name for journal in run.journals]
    return Footer(
        cost=_cost(main),
        not_seen=tuple(list(gaps)[:30]),
        files=(*files[:6], f"{len(files) - 6} more") if len(files) > 7 else tuple(files),
        redraw=f"gradctl report {shlex.quote(str(run.directory))}",
        version=main.run.gradctl if main and main.run else "",
    )


def _cost(main: Journal | None) -> str:
    end = main.end if main else None
    if end is None:
        return "unknown: the journal has no end record."
    once = f", and {seconds_text(end.one_off)} once for names and saved bytes" if end.one_off >= 0.005 else ""
    every = end.tiers.get("norm_every")
    rows = end.tiers.get("rows")
    looked: list[str] = []
    if isinstance(every, int):
        looked.append(
            "norms were measured "
            + ("every step" if every == 1 else f"every {count_text(every)} steps" if every else "on sampled steps only")
        )
    if isinstance(rows, int):
        looked.append(f"{count_text(rows)} steps were sampled tensor by tensor")
    tail = f" {'; '.join(looked).capitalize()}." if looked else ""
    faults = (
        f" {end.faults} fault{'s' if end.faults != 1 else ''} of gradctl, none of which reached the script."
        if end.faults
        else ""
    )
    steady = seconds_text(max(0.0, end.cost - end.one_off))
    share = f"{end.share * 100:.{2 if end.share < 0.1 else 0}f}"
    return f"{share} % of wall time: {steady} of {seconds_text(end.wall)}{once}.{tail}{faults}"
