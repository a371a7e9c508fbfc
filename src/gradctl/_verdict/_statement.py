"""What a judgement says: one sentence, its level, eight figures and the findings behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gradctl._journal import Journal
    from gradctl._results import Finding

Level = Literal["good", "note", "warning", "error"]
SHOWN = 4  # more findings than this are kept, but a reader who meets five reads none


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the row below the sentence.

    Args:
        label: what it is, lower case ("loss", "steps").
        value: what it came to, as text ("4.43 → 2.45", "52 / 52").
        detail: a qualification worth a small grey line, or empty.
    """

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run's journals say.

    Args:
        sentence: the verdict in one sentence.
        level: `good` nothing to do, `note` nothing wrong but something to know, `warning` look, `error` broken.
        findings: all findings, worst first.
        figures: the eight figures.
        main: the journal that the figures are about: the main process of rank 0; None if there is none.
        main_optimizer: id in `main` of the optimizer that the figures are about; None if no step was seen.
        stages: ids in `main` of the optimizers whose steps are the same steps (one optimizer a stage), the main one
            first; they belong on one axis.
        first_bad_step: step at which the first non-finite value was seen by the main optimizer; None if there was none.
    """

    sentence: str
    level: Level
    findings: tuple[Finding, ...]
    figures: tuple[Figure, ...]
    main: Journal | None
    main_optimizer: int | None
    stages: tuple[int, ...] = ()
    first_bad_step: int | None = None

    @property
    def shown(self) -> tuple[Finding, ...]:
        """The findings that a face shows: at most four, worst first."""
        return self.findings[:SHOWN]

    @property
    def hidden(self) -> int:
        """How many findings are kept and not shown."""
        return max(0, len(self.findings) - SHOWN)
