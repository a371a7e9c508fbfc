"""Findings on the terminal: the cause with its lines of source, the way to the loss, the fix. Judges nothing."""

from __future__ import annotations

import linecache
import os
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from gradctl._errors import GradctlError
from gradctl._results import Explanation, Finding, Span
from gradctl.report._cause import pages
from gradctl.report._fqns import collapse
from gradctl.report._lines import Lines

BEFORE, AFTER = 2, 1
INDENT, LABEL = 2, 10
PATTERNS = 8
SHORT = 12
HINT = 0.5
"""Below this confidence a finding is a hint."""
LEVELS = {0: "bold green", 1: "bold red", 3: "bold yellow", 4: "bold yellow"}
COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def draw(found: Explanation, *, console: Console) -> None:
    """Print what `gradctl explain` has found.

    Args:
        found: the explanation.
        console: where to; plain text where it is no terminal.
    """
    lines = Lines(console)
    lines.unbroken(f"gradctl explain {found.script}")
    real = [finding for finding in found.findings if finding.severity != "note"]
    notes = [finding for finding in found.findings if finding.severity == "note"]
    hints = bool(real) and all(finding.confidence < HINT for finding in real)
    if hints:
        _hints(lines, real, found)
    else:
        for place, finding in enumerate(real):
            lines.gap()
            (_whole if place == 0 else _short)(lines, finding, found)
        if not real or found.exit_code != 1 or _says_more(found):
            _sentence(lines, found)
        if not real:
            _symptoms(lines, found)
    if notes:
        lines.gap()
        lines.say("this also happens, and does no harm:", "dim", indent=INDENT)
        for finding in notes:
            _note(lines, finding)
    for remark in found.remarks:
        _row(lines, "remark", remark, "yellow")
    if real and _has_page(real[0].slug):
        lines.gap()
        lines.unbroken(f"  more about it: gradctl cause {real[0].slug}")


def _sentence(lines: Lines, found: Explanation) -> None:
    lines.gap()
    lines.say(f"● {found.sentence}", LEVELS.get(found.exit_code, ""), indent=INDENT, hang=2)


def _symptoms(lines: Lines, found: Explanation) -> None:
    for place, symptom in enumerate(found.symptoms):
        if place == 0:
            lines.gap()
        _row(lines, "symptom", symptom)


def _hints(lines: Lines, hints: Sequence[Finding], found: Explanation) -> None:
    """Print lines that may have done it, below what was seen: they prove nothing."""
    _sentence(lines, found)
    _symptoms(lines, found)
    for finding in hints:
        lines.gap()
        place = f"   {finding.primary}" if finding.primary else ""
        lines.put(_label("perhaps") + Text(lines.clean(f"{finding.slug}{place}"), style=COLOURS[finding.severity]))
        if finding.primary is not None:
            _source(lines, finding.primary, found.folder)
        _row(lines, "", finding.symptom)
        _fix(lines, finding.fix)


def _says_more(found: Explanation) -> bool:
    return not found.sentence.endswith(("cause", "causes"))


def _has_page(slug: str) -> bool:
    try:
        return slug in pages()
    except GradctlError:
        return False  # they are not installed; the finding stands without its page


def _whole(lines: Lines, finding: Finding, found: Explanation) -> None:
    _row(lines, "symptom", finding.symptom, "bold")
    place = f"   {finding.primary}" if finding.primary else ""
    lines.put(_label("cause") + Text(lines.clean(f"{finding.slug}{place}"), style=COLOURS[finding.severity]))
    if finding.primary is not None:
        _source(lines, finding.primary, found.folder)
    patterns = collapse(finding.parameters, found.names)
    if patterns:
        more = f" and {len(patterns) - PATTERNS} more" if len(patterns) > PATTERNS else ""
        count = f"  ({len(finding.parameters)})" if len(finding.parameters) > len(patterns) else ""
        _row(lines, "affected", ", ".join(patterns[:PATTERNS]) + more + count)
    if finding.path:
        _row(lines, "path", finding.path)
    _row(lines, "why", finding.why)
    _fix(lines, finding.fix)
    for place, span in enumerate(list(dict.fromkeys(finding.evidence))[:SHORT]):
        role = f"  {span.role}" if span.role else ""
        _row(lines, "see also" if place == 0 else "", f"{span}{role}", "dim")


def _short(lines: Lines, finding: Finding, found: Explanation) -> None:
    place = f"   {finding.primary}" if finding.primary else ""
    lines.put(_label("and") + Text(lines.clean(f"{finding.slug}{place}"), style=COLOURS[finding.severity]))
    _row(lines, "", finding.symptom)
    patterns = collapse(finding.parameters, found.names)
    if patterns:
        more = f" and {len(patterns) - 2} more" if len(patterns) > 2 else ""
        _row(lines, "affected", ", ".join(patterns[:2]) + more)
    _fix(lines, finding.fix)


def _note(lines: Lines, finding: Finding) -> None:
    place = f"   {finding.primary}" if finding.primary else ""
    lines.say(f"{finding.slug}{place}   {finding.symptom}", "dim", indent=INDENT + 2, hang=2)


def _label(word: str) -> Text:
    return Text(" " * INDENT) + Text(word.ljust(LABEL), style="dim")


def _row(lines: Lines, label: str, text: str, style: str = "") -> None:
    """Print a label and a text that wraps beside it."""
    if text:
        first, *others = lines.wrapped(text, room=lines.width - INDENT - LABEL, style=style)
        lines.put(_label(label) + first)
        for line in others:
            lines.put(Text(" " * (INDENT + LABEL)) + line)


def _fix(lines: Lines, fix: str) -> None:
    """Print the fix: prose wraps, further lines are code and stay as they are."""
    first, *code = fix.splitlines() or [""]
    _row(lines, "fix", first, "green")
    for line in code:
        lines.put(Text(" " * (INDENT + LABEL)) + Text(_code(lines, line), style="green"))


def _source(lines: Lines, span: Span, folder: str) -> None:
    shown = source(span, folder)
    if not shown:
        return
    lines.gap()
    for number, text in shown:
        marked = number == span.line
        mark = ">" if marked else " "
        line = Text(f"     {mark} {number:>4} | {_code(lines, text)}", style="bold" if marked else "dim")
        line.rstrip()
        if lines.is_terminal:
            line.truncate(lines.width)
        lines.put(line)
    lines.gap()


def source(span: Span, folder: str) -> list[tuple[int, str]]:
    """Return the lines around a place, numbered: two before, the line itself, one after; empty if it cannot be read.

    Args:
        span: the place.
        folder: where a relative path begins; the working directory is tried after it.
    """
    for file in dict.fromkeys((os.path.join(folder, span.file), os.path.abspath(span.file))):
        text = linecache.getlines(file)
        if 1 <= span.line <= len(text):
            first = max(1, span.line - BEFORE)
            return [(n, text[n - 1].rstrip("\n")) for n in range(first, min(len(text), span.line + AFTER) + 1)]
    return []


def _code(lines: Lines, text: str) -> str:
    return lines.clean(text.expandtabs(4))
