"""A run on the terminal: the sentence first, then eight figures, findings, ranks, worst layers, where it all lies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gradctl._journal import End, Journal, Run
from gradctl._results import Finding
from gradctl._verdict import Facts, Training, Verdict, judge_facts, lateness, missed
from gradctl._verdict._loss import trend
from gradctl._verdict._training import command, trainings
from gradctl._verdict._words import count, milliseconds, number, percent, seconds
from gradctl.report._lines import Lines, Row
from gradctl.report._text import clean

ROWS = 4
RANKS = 16
LEVELS = {"good": "bold green", "note": "bold cyan", "warning": "bold yellow", "error": "bold red"}
SEVERITIES = {"error": ("bad", "red"), "warning": ("look", "yellow"), "note": ("tip", "cyan")}


def draw(run: Run, *, console: Console, page: Path | None = None, kept: bool = False) -> Verdict:
    """Print the verdict of `run`.

    Args:
        run: a run directory, read.
        console: where to; plain text where it is no terminal.
        page: the HTML page, if there is one to name.
        kept: the page was there before and is not of now.

    Returns:
        The verdict that was printed.
    """
    facts = Facts(run)
    verdict = judge_facts(facts)
    lines = Lines(console)
    lines.say(f"● {verdict.sentence}", LEVELS[verdict.level], hang=2)
    lines.say(meta(facts), "dim", indent=2)
    lines.gap()
    _figures(lines, verdict)
    for finding in verdict.shown:
        lines.gap()
        _finding(lines, finding)
    if verdict.hidden:
        lines.unbroken(f"  and {count(verdict.hidden, 'more finding')}: gradctl report {run.directory} --json -")
    for head, rows in (_ranks(facts), _layers(facts)):
        if rows:
            lines.gap()
            lines.table(head, rows)
    lines.gap()
    unseen = missed(facts)
    if unseen:
        what, why = unseen[0]
        more = f"; and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        lines.say(f"unseen   {what}{f' ({why})' if why else ''}{more}", "yellow", indent=2, hang=9)
    if page is not None:
        lines.unbroken(f"  report   {page}{'  (kept; --force draws it again)' if kept else ''}")
    lines.unbroken(f"  journal  {verdict.main.path if verdict.main else run.directory}")
    return verdict


def meta(facts: Facts) -> str:
    """The grey line: command, exit, time, torch, ranks, date."""
    record, end = facts.record, facts.end
    if record is None:
        return str(facts.run.directory)
    if end is None:
        ended = "running" if facts.still_running else "no end record"
    else:
        ended = exit_of(end)
    parts = [clean(command(record, short=True), most=120), ended]
    if end is not None and end.wall > 0 and math.isfinite(end.wall):
        parts.append(seconds(end.wall))
    parts.append(f"torch {record.torch}" if record.torch else "")
    if record.device and record.device != "cpu":
        parts.append(record.device)
    world = max((j.run.world_size for j in facts.ranks if j.run), default=1)
    seen = max(len(facts.ranks), 1)
    parts.append(f"{seen} of {world} ranks" if world > seen else count(seen, "rank"))
    trained = sum(1 for j in facts.run.children if j not in facts.ranks)
    if trained:
        parts.append(count(trained, "child process", "child processes"))
    parts.append(when(record.started))
    return " · ".join(part for part in parts if part)


def when(started: float) -> str:
    """A wall-clock second as a date, UTC; empty for nonsense."""
    try:
        return f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC" if started > 0 else ""
    except (ValueError, OverflowError, OSError):
        return ""


def _figures(lines: Lines, verdict: Verdict) -> None:
    cells = [
        (lines.clean(f.label), lines.clean(f.value) + (f" ({lines.clean(f.detail)})" if f.detail else ""))
        for f in verdict.figures
    ]
    label = max(len(name) for name, _ in cells)
    half = -(-len(cells) // 2)
    left = max(Text(value).cell_len for _, value in cells[:half])
    wide = 2 + label + 2 + left + 3 + label + 2 + max(Text(value).cell_len for _, value in cells[half:])
    pairs = [(a, b) for a, b in zip(cells[:half], [*cells[half:], ("", "")], strict=False)]
    if wide > lines.width:
        pairs = [(cell, ("", "")) for cell in cells]
    for (name, value), (other, second) in pairs:
        line = Text("  ") + Text(name.ljust(label), style="dim") + Text("  ") + Text(value, style="bold")
        if other:
            line += Text(" " * (left - Text(value).cell_len + 3)) + Text(other.ljust(label), style="dim") + Text("  ")
            line += Text(second, style="bold")
        line.truncate(lines.width)
        lines.put(line)


def _finding(lines: Lines, finding: Finding) -> None:
    word, colour = SEVERITIES[finding.severity]
    lines.say(f"{word:<5} {finding.symptom}", f"bold {colour}", indent=2, hang=6)
    if finding.primary is not None:
        lines.say(f"at {finding.primary}", indent=8, hang=3)
    if finding.why:
        lines.say(finding.why, "dim", indent=8)
    words, *code = finding.fix.splitlines() or [""]
    lines.say(f"→ {words}", indent=8, hang=2)
    for line in code:
        lines.unbroken(f"{'':10}{line}")


def _ranks(facts: Facts) -> tuple[Row, list[Row]]:
    head = ("rank", "steps", "step", "backward", "rest", "loss", "ended")
    if not facts.several:
        return head, []
    late = lateness(facts)
    rows: list[Row] = []
    for journal in facts.ranks[:RANKS]:
        found = trainings(journal)
        same = [t for t in found if facts.training is not None and t.id == facts.training.id]
        training = same[0] if same else max(found, key=lambda t: t.weight, default=None)
        mark = " late" if late is not None and late.rank == journal.rank else ""
        rows.append((f"{journal.rank}{mark}", *_rank_cells(training), ended(journal)))
    if len(facts.ranks) > RANKS:
        rows.append((f"and {len(facts.ranks) - RANKS} more", *[""] * (len(head) - 1)))
    return head, rows


def _rank_cells(training: Training | None) -> Row:
    times = training.milliseconds() if training else None
    if training is None or times is None:
        return (str(training.steps) if training else "0", "", "", "", "")
    step, backward, optimizer, _ = times
    seen = trend(training)
    loss = f"{number(seen.first)} → {number(seen.last)}" if seen else ""
    rest = max(0.0, step - backward - optimizer)
    return str(training.steps), milliseconds(step), milliseconds(backward), milliseconds(rest), loss


def ended(journal: Journal) -> str:
    """How one process ended, in a word or two."""
    if journal.end is None:
        return "no end record"
    return exit_of(journal.end)


def exit_of(end: End) -> str:
    """The exit code, or that nobody knows it; a recording that was stopped in mid-program has none."""
    if end.code is not None:
        return f"exit {end.code}"
    return "stopped" if end.how == "stopped" else "exit code not known"


def _layers(facts: Facts) -> tuple[Row, list[Row]]:
    """The worst few tensors: never reached, non-finite, zero, then those that move most or least for their size."""
    head = ("layer", "shape", "gradient", "update/weight", "")
    found: list[tuple[float, Row]] = [row for training in facts.stages for row in _layer_rows(training)]
    found.sort(key=lambda pair: -pair[0])
    return head, [row for _, row in found[:ROWS]]


def _layer_rows(training: Training) -> Iterator[tuple[float, Row]]:
    if not training.measured:
        return
    rows = training.late_rows or training.rows[-8:]
    norms, ratios = training.norms([r.g for r in rows]), training.ratios(rows)
    zero = training.zero_since
    last = training.measured[0][1]
    lost = set(training.never[1])
    for i in range(training.tensors):
        name = training.name(i)
        shape = " × ".join(str(d) for d in training.record.shapes[i]) if i < len(training.record.shapes) else ""
        gradient, ratio = norms.get(i), ratios.get(i)
        badness, remark = 0.0, ""
        if training.record.name(i) in lost:
            badness, remark = 40.0, "never reached"
        elif i < len(last) and (g := last[i]) is not None and math.isnan(g):
            badness, remark = 30.0, "NaN"
        elif i in zero and training.steps >= 3:
            badness, remark = 20.0, f"zero since step {zero[i]}" if zero[i] > 3 else "zero"
        elif ratio is not None and ratio > 0:
            badness = abs(math.log10(ratio) + 3)
        else:
            continue
        cells = (
            name,
            shape,
            "" if gradient is None else number(gradient),
            "" if ratio is None else percent(ratio),
            remark,
        )
        yield badness, cells
