"""`--on-nonfinite explain`: after the first NaN or inf gradient of a recorded run, say what can be said of its line.

The forward of that step is over and was not traced. If its update has put NaN into the weights, every later number is
NaN too and shows nothing: then the command is told that finds the line in a second run. If it has not (a loss scaler or
the program itself passed it over), the steps that follow are traced until it comes again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from gradctl import _taps
from gradctl._journal import JournalWriter

STEPS = 20
"""So many steps are traced at most."""
_NUMBERS = ("nan_", "nonfinite", "exploded_")


class NonfiniteExplainer:
    """Waits for the first gradient that is not finite.

    Args:
        journal: where the event `explain` goes.
        script: what the script is called, for the command that is told.
        say: says a sentence to the person; does nothing in a quiet run.
    """

    def __init__(self, journal: JournalWriter, script: str, say: Callable[[str], None]) -> None:
        self._journal = journal
        self._script = script
        self._say = say
        self._step: int | None = None
        self._handle: _taps.Handle | None = None
        self._tracing: Any = None
        self._ended = False

    def heard(self, name: str, fields: Mapping[str, Any]) -> None:
        """Hear of an event of the recorder; the first gradient that is not finite begins it.

        Args:
            name: of the event.
            fields: its fields.
        """
        if self._ended or self._step is not None or name != "nonfinite" or fields.get("what") != "grad":
            return
        self._step = int(fields.get("n") or 0)
        # Not at once: the optimizer is about to step, and its own operations are none of the program's.
        self._handle = _taps.optimizer_step.subscribe(after=self._stepped, order="record")

    def stop(self) -> None:
        """End tracing and say what was found so far; a second call does nothing."""
        if not self._ended:
            self._end(last=True)

    def drop(self) -> None:
        """In a forked child: forget everything and say nothing."""
        self._ended = True
        self._take_back()

    def _stepped(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ended:
            return
        try:
            self._look(optimizer)
        except Exception as fault:
            self._tell(f"its line could not be looked for: {type(fault).__name__}: {fault}", [])

    def _look(self, optimizer: Any) -> None:
        if self._tracing is not None:
            if self._tracing.steps >= STEPS or self._found():
                self._end(last=self._tracing.steps >= STEPS)
            return
        explain = importlib.import_module("gradctl._explain")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        bad = sum(1 for size in explain.largest(params) if size is not None and size - size != 0.0)
        if bad:
            noun = "parameter" if bad == 1 else "parameters"
            self._tell(
                f"its update has made {bad} {noun} NaN or inf, so that later steps show nothing. "
                f"For the line: gradctl explain --at-step {self._step} {self._script}",
                [],
            )
            return
        self._tracing = explain.Tracing()
        self._tracing.start()

    def _found(self) -> list[Any]:
        return [f for f in self._tracing.findings() if f.slug.startswith(_NUMBERS) and f.severity != "note"]

    def _end(self, *, last: bool) -> None:
        if self._tracing is None:
            self._ended = True
            self._take_back()
            return
        found, steps = self._found(), self._tracing.steps
        if found:
            first = found[0]
            place = f" at {first.primary}" if first.primary else ""
            self._tell(f"it came again: {first.slug}{place}: {first.why}. Fix: {first.fix}", found)
        elif last:
            self._tell(
                f"it has not come again in the {steps} steps that were traced after it. "
                f"For the line: gradctl explain --at-step {self._step} {self._script}",
                [],
            )

    def _tell(self, text: str, findings: list[Any]) -> None:
        self._ended = True
        self._take_back()
        self._journal.event("explain", n=self._step, text=text, findings=[finding.to_json() for finding in findings])
        self._say(f"gradctl: step {self._step} had a gradient that is not finite; {text}")

    def _take_back(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()
        tracing, self._tracing = self._tracing, None
        if tracing is not None:
            tracing.stop()


def explainer(
    on_nonfinite: str, journal: JournalWriter, script: str, say: Callable[[str], None]
) -> NonfiniteExplainer | None:
    """Return what explains the first gradient that is not finite, if that was asked for.

    Args:
        on_nonfinite: the policy.
        journal: see `NonfiniteExplainer`, as the two that follow.
        script: as there.
        say: as there.
    """
    return NonfiniteExplainer(journal, script, say) if on_nonfinite == "explain" else None
