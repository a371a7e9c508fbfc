"""What the verbs that judge return: findings and where they point, frozen, to and from JSON."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
FINDINGS = "gradctl.findings/1"
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
