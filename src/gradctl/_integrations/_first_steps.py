"""What the callbacks share: trace the first steps of a training, report, and stop it on request."""

from __future__ import annotations

from typing import Any

from gradctl._errors import BrokenGradients
from gradctl._explain import Watch, watch
from gradctl._results import Findings


class FirstSteps:
    """The first steps of one training.

    Args:
        steps: how many optimizer steps are traced.
        stop: end the training when they show an error.
        quiet: print nothing.
    """

    def __init__(self, steps: int, stop: bool, quiet: bool) -> None:
        self._steps = steps
        self._stop = stop
        self._quiet = quiet
        self._watch: Watch | None = None
        self._told = False
        self.findings = Findings()
        watch(steps=steps)  # refuses what does not fit before the training begins

    @property
    def running(self) -> bool:
        """Whether steps are being traced now."""
        return self._watch is not None and self._watch.running

    def begin(self, model: Any) -> None:
        """Begin to trace; a trace that an earlier training has left running ends first."""
        self.end(None)
        self._told = False
        self._watch = watch(model, steps=self._steps, quiet=self._quiet)
        self._watch.start()

    def look(self) -> None:
        """After a step: take the findings once there are any.

        Raises:
            BrokenGradients: they show an error, and the training shall stop then.
        """
        if self._watch is None or self._watch.running or self._told:
            return
        self._told = True
        self.findings = self._watch.findings
        broken = [finding for finding in self.findings if finding.severity == "error"]
        if self._stop and broken:
            first = broken[0]
            place = f" at {first.primary}" if first.primary else ""
            raise BrokenGradients(
                f"training stopped after {self._watch.steps} steps: {first.slug}{place}",
                what=first.symptom,
                why=first.why,
                fix=first.fix,
            )

    def end(self, error: BaseException | None) -> None:
        """Stop tracing, if it still goes on.

        Args:
            error: what ended the training, or None.
        """
        if self._watch is not None and self._watch.running:
            self._watch.end(error)
            self.findings = self._watch.findings
            self._told = True
