"""A list of findings that shows itself: as text on a terminal, as HTML in a notebook."""

from __future__ import annotations

import html
import linecache
import os
from collections.abc import Iterable, Sequence

from gradctl._results import Finding, Span

_BEFORE, _AFTER = 2, 1
_NAMES = 6
_COLOURS = {"error": "#c0392b", "warning": "#b9770e", "note": "#5d6d7e"}


class Findings(list[Finding]):
    """What was found, most certain first; a list of `Finding`.

    Args:
        found: the findings.
        remarks: what a reader must know besides: what was not looked at.
        folder: where relative paths of source files begin.
        subject: what was looked at, in words.
    """

    def __init__(
        self, found: Iterable[Finding] = (), *, remarks: Sequence[str] = (), folder: str = "", subject: str = ""
    ) -> None:
        super().__init__(found)
        self.remarks = tuple(remarks)
        self.folder = folder
        self.subject = subject

    @property
    def headline(self) -> str:
        """The result in one line."""
        real = sum(1 for finding in self if finding.severity != "note")
        of = f" of {self.subject}" if self.subject else ""
        if real:
            return f"{real} {'cause' if real == 1 else 'causes'} found in the gradients{of}"
        return f"nothing is wrong with the gradients{of}"

    def __str__(self) -> str:
        parts = [self.headline, *(self._text(finding) for finding in self)]
        parts += [f"remark    {remark}" for remark in self.remarks]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        blocks = [f"<div><b>{html.escape(self.headline)}</b></div>"]
        for finding in self:
            colour = _COLOURS[finding.severity]
            place = f" <code>{html.escape(str(finding.primary))}</code>" if finding.primary else ""
            rows = "".join(
                f'<tr><td style="color:#888;vertical-align:top;text-align:left">{label}</td>'
                f'<td style="text-align:left"><span style="white-space:pre-wrap">{html.escape(text)}</span></td></tr>'
                for label, text in self._rows(finding)
            )
            code = self._code(finding)
            blocks.append(
                f'<div style="border-left:3px solid {colour};padding-left:8px;margin:8px 0">'
                f'<b style="color:{colour}">{html.escape(finding.slug)}</b>{place}'
                f"{f'<pre>{html.escape(code)}</pre>' if code else ''}<table>{rows}</table></div>"
            )
        blocks += [f"<div><i>{html.escape(remark)}</i></div>" for remark in self.remarks]
        return "".join(blocks)

    def _text(self, finding: Finding) -> str:
        place = f"   {finding.primary}" if finding.primary else ""
        lines = [f"  {finding.severity:<9} {finding.slug}{place}"]
        code = self._code(finding)
        if code:
            lines += ["", *(f"     {line}" for line in code.splitlines()), ""]
        for label, text in self._rows(finding):
            first, *more = text.splitlines() or [""]
            lines += [f"  {label:<9} {first}", *(f"{'':12}{line}" for line in more)]
        return "\n".join(lines)

    def _rows(self, finding: Finding) -> list[tuple[str, str]]:
        names = ", ".join(finding.parameters[:_NAMES])
        more = f" and {len(finding.parameters) - _NAMES} more" if len(finding.parameters) > _NAMES else ""
        also = "\n".join(dict.fromkeys(f"{span}  {span.role}" for span in finding.evidence[:3]))
        rows = [
            ("symptom", finding.symptom),
            ("affected", names + more),
            ("path", finding.path),
            ("why", finding.why),
            ("fix", finding.fix),
            ("see also", also),
        ]
        return [(label, text) for label, text in rows if text]

    def _code(self, finding: Finding) -> str:
        """Return the lines around the place, numbered, the line itself marked."""
        span = finding.primary
        if span is None:
            return ""
        text = _source(span, self.folder)
        first = max(1, span.line - _BEFORE)
        return "\n".join(
            f"{'>' if number == span.line else ' '} {number:>4} | {text[number - 1].rstrip()}"
            for number in range(first, min(len(text), span.line + _AFTER) + 1)
        )


def _source(span: Span, folder: str) -> list[str]:
    for file in dict.fromkeys((span.file, os.path.join(folder, span.file))):
        text = linecache.getlines(file)
        if 1 <= span.line <= len(text):
            return text
    return []
