"""From what was measured to findings: the cause, how sure, what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradctl._check._graph import Graph
from gradctl._finite_difference import REORDERED, Comparison, Mismatch
from gradctl._results import Finding, Findings, Severity, Span

_NAMES = 6


@dataclass(slots=True)
class Circumstances:
    """What besides the comparison is known.

    Args:
        subject: the name of what was checked.
        order: 1 or 2.
        graph: what the graph of the forward told.
        remarks: what a reader must know.
    """

    subject: str
    order: int
    graph: Graph
    remarks: list[str] = field(default_factory=list[str])


def judged(comparison: Comparison, circumstances: Circumstances, *, notes: bool) -> Findings:
    """Return the findings, errors first; what does no harm only with `notes`, else as remarks."""
    found: list[Finding] = []
    if comparison.forward_repeat > REORDERED:
        found.append(_forward_differs(comparison.forward_repeat))
    groups: dict[object, list[Mismatch]] = {}
    for mismatch in comparison.mismatches:
        groups.setdefault(_alike(mismatch), []).append(mismatch)
    found += [_finding(group, circumstances) for group in groups.values()]
    if comparison.kinks:
        found.append(_kink(comparison.kinks))
    found.sort(key=lambda finding: ("error", "warning", "note").index(finding.severity))
    remarks = [*circumstances.remarks, *_remarks(comparison, circumstances)]
    if not notes:
        remarks += [finding.symptom for finding in found if finding.severity == "note"]
        found = [finding for finding in found if finding.severity != "note"]
    return Findings(found, remarks=remarks, subject=circumstances.subject)


def slug_of(mismatch: Mismatch) -> str:
    """Return the word for how a gradient is wrong."""
    if mismatch.nonfinite:
        return "nonfinite"
    if mismatch.repeat:
        return "non-determinism"
    if mismatch.is_none:
        return "none"
    if mismatch.constant:
        return "piecewise-constant"
    if mismatch.rounded_to:
        return "float32"
    if mismatch.factor is not None:
        return "factor"
    if mismatch.transposed:
        return "transposed"
    if mismatch.conjugate:
        return "conjugate"
    if mismatch.swapped_with:
        return "swapped"
    return "elements" if mismatch.elements else "missing-term"


def _alike(mismatch: Mismatch) -> object:
    slug = slug_of(mismatch)
    if slug == "factor" and mismatch.factor is not None:
        return slug, f"{mismatch.factor:.6g}"
    if slug == "nonfinite":
        return slug, math.isfinite(mismatch.numeric)
    return (slug, mismatch.name) if slug == "elements" else slug


def _finding(group: Sequence[Mismatch], circumstances: Circumstances) -> Finding:
    worst = max(group, key=lambda m: m.relative if math.isfinite(m.relative) else 0.0)
    slug = slug_of(worst)
    severity, symptom, why, fix, confidence = _words(slug, worst, len(group), circumstances.order)
    padded = [m.name for m in group if circumstances.order == 2 and m.name in circumstances.graph.padded]
    if padded:
        why = (
            "The padding row of an embedding gets no gradient by design, and torch's double backward leaves it out: a "
            "product with the Hessian is right only for directions that are zero in that row."
        )
        fix = "keep the direction zero in the padding row"
    hooked = [m.name for m in group if m.hooks]
    if hooked:
        why += f" {', '.join(hooked)} {'has' if len(hooked) == 1 else 'have'} gradient hooks, which count here."
    measured = {
        "relative": worst.relative,
        "gradient": worst.analytic,
        "finite_difference": worst.numeric,
        "error": worst.error,
    }
    if worst.factor is not None:
        measured["factor"] = 1 / worst.factor if worst.factor else math.inf
    if worst.repeat:
        measured = {"relative": worst.repeat}
    return Finding(
        slug=slug,
        severity=severity,
        symptom=symptom,
        why=why,
        fix=fix,
        confidence=confidence,
        primary=_author(circumstances.graph),
        parameters=tuple(m.name for m in group),
        measured={key: value for key, value in measured.items() if math.isfinite(value)} or None,
    )


def _words(slug: str, worst: Mismatch, count: int, order: int) -> tuple[Severity, str, str, str, float]:
    """Return severity, symptom, why, fix and confidence."""
    what = "gradient" if order == 1 else "second derivative"
    name = worst.name + (f" (and {count - 1} more)" if count > 1 else "")
    off = _percent(worst.relative)
    along = f"along a random direction it gives {worst.analytic:.6g}, finite differences give {worst.numeric:.6g}"
    if slug == "none":
        return (
            "error",
            f"the {what} of {name} is None, but the outputs move with it: {worst.numeric:.6g} along a random direction",
            "Autograd saw no path: a detach, a number taken out with .item(), or a backward that returns None for it.",
            "return its gradient from the backward, or remove the cut (gradctl.explain names the line)",
            0.99,
        )
    if slug == "nonfinite":
        known = math.isfinite(worst.numeric)
        symptom = f"the {what} of {name} has {worst.nonfinite} NaN or infinite elements"
        if known:
            return (
                "error",
                f"{symptom}, but the outputs change by {worst.numeric:.6g} along a random direction",
                "An operation has an infinite slope where its result is not used: a square root or norm at zero, a "
                "division inside of torch.where.",
                "keep the operand away from the singular point before the operation, not after it",
                0.95,
            )
        return (
            "note",
            f"{symptom}; the function itself is singular there",
            "No derivative exists.",
            "check elsewhere",
            0.7,
        )
    if slug == "non-determinism":
        return (
            "error",
            f"two backwards of one graph give {name} {what}s that differ by {worst.repeat:.2g} of their size",
            "The backward draws random numbers or reads memory that changes.",
            "save in the forward what the backward needs",
            0.99,
        )
    if slug == "piecewise-constant":
        return (
            "warning",
            f"the outputs do not move with {name}, but its {what} is not zero: {along}",
            "Rounding, sign, argmax and the like are constant almost everywhere; a straight-through gradient differs "
            "by design.",
            f"mean it: gradctl.check(..., expected=[{worst.name!r}])",
            0.9,
        )
    if slug == "float32":
        return (
            "note" if worst.rounded_to == "float32" else "warning",
            f"the {what} of {name} is off by {worst.relative:.2g}, which is the rounding of {worst.rounded_to}",
            "The backward computes in a lower dtype than the forward.",
            "keep the dtype of the incoming gradient in the backward",
            0.9,
        )
    if slug == "factor" and worst.factor is not None:
        return (
            "error",
            f"the {what} of {name} is {_times(worst.factor)} the derivative: {along}",
            _factor_reason(worst.factor),
            f"multiply what the backward returns by the inverse; if it is meant, expected=[{worst.name!r}]",
            0.95,
        )
    if slug == "transposed":
        return (
            "error",
            f"the {what} of {name} is transposed: {along}",
            "The derivative is its transpose, along every direction that was tried.",
            f"transpose what the backward returns for {worst.name}",
            0.99,
        )
    if slug == "conjugate":
        return (
            "error",
            f"the {what} of {name} is the conjugate of the derivative: {along}",
            "A backward multiplies with the conjugate of the other factor.",
            "conjugate the saved factor in the backward",
            0.99,
        )
    if slug == "swapped":
        return (
            "error",
            f"the {what} of {name} is not its own: the derivative is what {worst.swapped_with} got; {along}",
            "A backward returns gradients in the order of its inputs.",
            f"exchange what it returns for {worst.name} and {worst.swapped_with}",
            0.99,
        )
    if slug == "elements":
        places = ", ".join(str(list(index)) for index in worst.elements)
        total = math.prod(worst.shape)
        return (
            "error",
            f"the {what} of {name} is wrong in {len(worst.elements)} of {total} elements: {places}",
            f"All other elements are right; {along}.",
            "look at how the backward treats these places: borders, masks, repeated indices",
            0.95,
        )
    return (
        "error",
        f"the {what} of {name} is {off} off: {along}",
        "A term is missing or wrong: no factor, transpose or exchange explains it."
        + (" A detached or saved intermediate, or once_differentiable, drops terms silently." if order == 2 else ""),
        "derive the backward again, or find the part that is detached",
        0.9,
    )


def _times(factor: float) -> str:
    """Return how often the derivative the gradient is, as a person says it."""
    times = 1 / factor if factor else math.inf
    near = round(factor)
    if abs(factor) > 1.5 and abs(factor - near) < 1e-6 * abs(factor):
        return f"{'-' if factor < 0 else ''}1/{abs(near)} of"
    return f"{times:.6g} times"


def _factor_reason(factor: float) -> str:
    if abs(factor + 1) < 1e-6:
        return "The sign is wrong."
    if factor > 1.5 and abs(factor - round(factor)) < 1e-6 * factor:
        return "A mean where a sum belongs, or a term that is counted too seldom."
    if 0 < factor < 0.75 and abs(1 / factor - round(1 / factor)) < 1e-6 / factor:
        return "A sum where a mean belongs, or a term that is counted more than once."
    return "The backward is the derivative times a constant."


def _kink(kinks: Sequence[Mismatch]) -> Finding:
    first = kinks[0]
    more = f" (and {len(kinks) - 1} more)" if len(kinks) > 1 else ""
    settled = first.error <= 0.1 * abs(first.numeric)
    given = f"differences give {first.numeric:.6g}" if settled else "differences do not settle"
    return Finding(
        slug="kink",
        severity="note",
        symptom=f"this point is at a kink for {first.name}{more}: {given} where autograd has chosen "
        f"{first.analytic:.6g}; right beside it they agree",
        why="A function such as ReLU at 0, a tie in a maximum or abs at 0 has no derivative there, and autograd takes "
        "one of its sides.",
        fix="nothing; to see it gone, check at inputs that are moved a little",
        confidence=0.9,
        parameters=tuple(m.name for m in kinks),
        measured={"gradient": first.analytic, "finite_difference": first.numeric},
    )


def _forward_differs(repeat: float) -> Finding:
    return Finding(
        slug="non-determinism",
        severity="error",
        symptom=f"two forwards from the same random states differ by {repeat:.2g} of the outputs; nothing was compared",
        why="The function draws from a generator that is not seen, or depends on something that it changes itself.",
        fix="make the function depend on its inputs only: pass what is drawn as an argument",
        confidence=0.99,
        measured={"relative": repeat} if math.isfinite(repeat) else None,
    )


def _remarks(comparison: Comparison, circumstances: Circumstances) -> list[str]:
    remarks: list[str] = []
    if comparison.precision != "float64":
        remarks.append("the function takes no float64: compared in float32, faults below 0.1 % are not seen")
    if comparison.lowest is not None:
        remarks.append(f"{comparison.lowest[1]} rounds to {comparison.lowest[0]}: differences are as coarse as that")
    if comparison.casts_raised:
        remarks.append("casts to float32 went to float64 in this check")
    if comparison.undecided:
        worst = max(comparison.undecided.values())
        known = f"than {worst:.1g} of their gradient" if worst < 1 else "at all: no step gives settled differences"
        names = list(comparison.undecided)
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        remarks.append(f"{', '.join(names[:_NAMES])}{more} could not be compared {'better ' * (worst < 1)}{known}")
    graph = circumstances.graph
    if graph.hidden:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in graph.hidden[:4])
        remarks.append(
            f"{len(graph.hidden)} tensors that require a gradient are used and were not checked (shapes {shapes}): "
            "pass them as inputs, or the module that holds them as params"
        )
    if graph.frozen:
        remarks.append(f"frozen rows of {', '.join(graph.frozen)} were checked as if they were not frozen")
    if graph.padding and circumstances.order == 1:
        remarks.append("the padding row of an embedding has no gradient by design and was not moved")
    return remarks


def _author(graph: Graph) -> Span | None:
    """Return the backward of the only custom function on the way."""
    if len(graph.authors) != 1:
        return None
    try:
        backward = inspect.unwrap(graph.authors[0].__dict__["backward"].__func__)
        lines, first = inspect.getsourcelines(backward)
        decorators = next((i for i, line in enumerate(lines) if line.lstrip().startswith("def ")), 0)
        return Span(file=inspect.getsourcefile(backward) or "?", line=first + decorators)
    except (KeyError, AttributeError, TypeError, OSError):
        return None


def _percent(share: float) -> str:
    return f"{share:.1%}" if 1e-3 <= share < 10 else f"a share of {share:.2g}"
