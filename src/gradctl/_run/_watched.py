"""`--watch-steps N`: beside the recorder, trace the first N steps, and say which line loses a gradient in them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from gradctl._journal import JournalWriter


class StepWatcher:
    """Traces from the beginning until every optimizer has made so many steps, an error ends the program, or it ends.

    Nothing that goes wrong in here reaches the program: it is said, and the recorder goes on.

    Args:
        steps: how many steps of each optimizer.
        journal: where the event `explain` goes.
        script: absolute path of the file that runs; None to look for it.
        say: says a text to the person; does nothing in a quiet run.
        rank: of a launched job: one of another rank than 0 says in one line what it has found, and nothing else.
    """

    def __init__(
        self, steps: int, journal: JournalWriter, script: str | None, say: Callable[[str], None], *, rank: int = 0
    ) -> None:
        self._limit = steps
        self._journal = journal
        self._script = script
        self._say = say
        self._rank = rank
        self._tracing: Any = None

    def begin(self) -> None:
        """Begin to trace; torch has been imported."""
        try:
            explain = importlib.import_module("gradctl._explain")
            tracing = explain.Tracing(
                script=self._script or explain.script(),
                steps=self._limit,
                on_done=self._done,
                gives_way=self._gave_way,
            )
            tracing.start()
        except Exception as fault:
            self._failed(fault)
            return
        self._tracing = tracing

    def end(self, error: BaseException | None) -> None:
        """Stop tracing, put everything back, and say what was found; a second call does nothing.

        Args:
            error: what ended the program, or None.
        """
        tracing, self._tracing = self._tracing, None
        if tracing is None:
            return
        try:
            found = importlib.import_module("gradctl._explain").watched(tracing, error)
            if found or tracing.faults or tracing.steps or tracing.context.facts.backwards:
                self._tell(found)
        except Exception as fault:
            self._failed(fault)

    def drop(self) -> None:
        """In a forked child: stop, and say nothing."""
        tracing, self._tracing = self._tracing, None
        if tracing is not None:
            tracing.stop()

    def _done(self) -> None:
        self.end(None)

    def _gave_way(self) -> None:
        self._tracing = None
        self._say("gradctl: the program traces its steps itself: they are not traced a second time (--watch-steps)")

    def _failed(self, fault: Exception) -> None:
        self._say(f"gradctl: the first steps could not be traced: {type(fault).__name__}: {fault}")

    def _tell(self, found: Any) -> None:
        self._journal.event("explain", text=found.headline, findings=[finding.to_json() for finding in found])
        if self._rank:
            if found:
                places = ", ".join(f"{one.slug} at {one.primary}" for one in found)
                self._say(f"gradctl: rank {self._rank}: {places}")
        elif found:
            self._say(f"gradctl: {found}")
        else:
            self._say("gradctl: " + "; ".join([found.headline, *found.remarks]))


def watcher(
    steps: int | None,
    journal: JournalWriter,
    script: str | None,
    say: Callable[[str], None],
    *,
    grad: str,
    rank: int = 0,
) -> StepWatcher | None:
    """Return what traces the first steps, if that was asked for and there are gradients to trace.

    Args:
        steps: the policy's `watch_steps`.
        journal: see `StepWatcher`, as the two that follow.
        script: as there.
        say: as there.
        grad: the policy's `grad`.
        rank: as there.
    """
    return StepWatcher(steps, journal, script, say, rank=rank) if steps is not None and grad == "on" else None
