"""What the verbs that judge return: findings and where they point, frozen, to and from JSON."""

from __future__ import annotations

import html
import linecache
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
FINDINGS = "gradctl.findings/1"
_BEFORE, _AFTER = 2, 1
_NAMES = 6
_COLOURS = {"error": "#c0392b", "warning": "#b9770e", "note": "#5d6d7e"}
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Span:
    """A place in a source file.

    Args:
        file: path, relative to the script's folder where it lies below it.
        line: line number from 1.
        role: what happened there (`cut`, `made`, `consumed`, `frozen`, ...); empty for a primary span.
    """

    file: str
    line: int
    role: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the span as `gradctl.findings/1` writes it."""
        place: dict[str, Any] = {"file": self.file, "line": self.line}
        return place | {"role": self.role} if self.role else place

    @staticmethod
    def from_json(data: dict[str, Any]) -> Span:
        """Read what `to_json` wrote."""
        return Span(file=data["file"], line=data["line"], role=data.get("role", ""))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a person should know about the gradients of a program.

    Args:
        slug: the cause, a stable word that scripts may match.
        severity: `error` (broken), `warning` (look at it), `note` (a tip).
        symptom: the claim, with a number, in one line.
        why: why it matters, in one or two sentences.
        fix: the next command or action.
        confidence: from 0 to 1.
        primary: the place to look at first.
        evidence: further places, each with a role.
        parameters: FQNs of the parameters concerned.
        measured: what was measured, if anything was (for example `{"step_ratio": 0.83}`).
        path: the way from a parameter to the loss, on one line, with the place where it ends; empty if there is none.
    """

    slug: str
    severity: Severity
    symptom: str
    why: str
    fix: str
    confidence: float = 1.0
    primary: Span | None = None
    evidence: tuple[Span, ...] = ()
    parameters: tuple[str, ...] = ()
    measured: dict[str, float] | None = None
    path: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as `gradctl.findings/1` writes it."""
        return {
            "slug": self.slug,
            "severity": self.severity,
            "confidence": self.confidence,
            "symptom": self.symptom,
            "primary": self.primary.to_json() if self.primary else None,
            "evidence": [span.to_json() for span in self.evidence],
            "parameters": list(self.parameters),
            "path": self.path,
            "why": self.why,
            "fix": self.fix,
            "measured": self.measured,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Finding:
        """Read what `to_json` wrote."""
        return Finding(
            slug=data["slug"],
            severity=data["severity"],
            symptom=data["symptom"],
            why=data["why"],
            fix=data["fix"],
            confidence=data.get("confidence", 1.0),
            primary=Span.from_json(data["primary"]) if data.get("primary") else None,
            evidence=tuple(Span.from_json(span) for span in data.get("evidence", ())),
            parameters=tuple(data.get("parameters", ())),
            measured=data.get("measured"),
            path=data.get("path", ""),
        )

    def __str__(self) -> str:
        place = f" ({self.primary})" if self.primary else ""
        return f"{self.severity}: {self.symptom}{place}\n  why   {self.why}\n  fix   {self.fix}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


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


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `gradctl explain` says about one script.

    Args:
        script: what was run: a file's name, a module, `command` or `stdin`.
        exit_code: that of the verb: 0 clean, 1 findings, 3 a failure of gradctl, 4 no verdict.
        sentence: the verdict in one line.
        findings: causes, the worst first; without one there may still be symptoms.
        symptoms: what was seen going wrong, in words.
        remarks: what a reader must know besides, one line each: what was not seen, what was repeated.
        versions: of gradctl, Python and torch.
        folder: where relative paths of source files begin.
        names: FQNs of all parameters that were seen, with a gradient or without one.
    """

    script: str
    exit_code: int
    sentence: str
    findings: tuple[Finding, ...] = ()
    symptoms: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict[str, str])
    folder: str = ""
    names: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the explanation as `gradctl.findings/1`."""
        return {
            "schema": FINDINGS,
            "script": self.script,
            "exit_code": self.exit_code,
            "versions": self.versions,
            "findings": [finding.to_json() for finding in self.findings],
        }


def _source(span: Span, folder: str) -> list[str]:
    for file in dict.fromkeys((span.file, os.path.join(folder, span.file))):
        text = linecache.getlines(file)
        if 1 <= span.line <= len(text):
            return text
    return []
