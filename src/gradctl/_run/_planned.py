"""`gradctl run --plan`: the plan is applied to its model in the script, and one step under it is measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from gradctl._journal import JournalWriter


class Planned:
    """Applies a plan, and writes an event `plan` about it.

    A plan that cannot be read, or that fits no model of the script, is said; the script goes on without it.

    Args:
        path: the plan's file.
        journal: where the event goes.
        say: says a text to the person.
    """

    def __init__(self, path: str, journal: JournalWriter, say: Callable[[str], None]) -> None:
        self._path = path
        self._journal = journal
        self._say = say
        self._script: Any = None
        self._plan: Any = None

    def begin(self) -> None:
        """Look for the model; torch has been imported."""
        try:
            fit = importlib.import_module("gradctl._fit")
            self._plan = fit.Plan.load(self._path)
            self._script = fit.ScriptPlan(self._plan, self._tell)
            self._script.start()
        except Exception as fault:
            self._script = None
            self._failed(str(fault))

    def end(self) -> None:
        """Stop, and say it if the plan was never applied; a second call does nothing."""
        script, self._script = self._script, None
        if script is None:
            return
        script.stop()
        if not script.applied:
            self._failed(str(script.nearest) if script.nearest is not None else "no model was called with gradients on")

    def undo(self) -> None:
        """Give the model its own forward back."""
        if self._plan is not None:
            self._plan.undo()

    def drop(self) -> None:
        """In a forked child: stop, and say nothing."""
        script, self._script = self._script, None
        if script is not None:
            script.drop()

    def _tell(self, model: str, peak: int | None) -> None:
        self._journal.event(
            "plan",
            file=self._path,
            model=model,
            applied=True,
            **figures(self._plan),
            measured=peak,
        )

    def _failed(self, why: str) -> None:
        self._journal.event("plan", file=self._path, applied=False, why=why)
        self._say(f"gradctl: the plan was not applied: {why}")


def figures(plan: Any) -> dict[str, Any]:
    """Return what the event tells of a plan."""
    return {
        "budget": plan.budget,
        "predicted": plan.predicted_peak,
        "plain": plan.plain_peak,
        "slowdown": round(plan.predicted_slowdown, 4),
    }


def planned(path: str | None, journal: JournalWriter, say: Callable[[str], None]) -> Planned | None:
    """Return what applies a plan, if there is one."""
    return None if path is None else Planned(path, journal, say)
