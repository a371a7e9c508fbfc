"""The script's side of `gradctl memory`: measure one step in its main process, and tell what was seen.

Nothing here raises into the script. Gradients are recorded up to the step before the measured one only: what a recorder
allocates is none of the program's.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
from collections.abc import Callable
from typing import Any

from gradctl import _taps
from gradctl import _torch_private as private
from gradctl._journal import JournalWriter

_BACKWARDS = 8
"""So many backwards without an optimizer in sight, and each is taken for a step."""
_ROWS = 60


class Metered:
    """Measures the step between two optimizer steps, or, in a program without one, between two backwards.

    Args:
        told: `step`, the number of the step, 2 or more; `json`, `pickle` and `descriptor`, where the report goes.
        journal: where the event `memory` goes.
        say: says a text to the person; does nothing in a quiet run.
        rank: of a launched job: rank 0 alone says and writes what it has found, the others leave it in the journal.
    """

    def __init__(
        self, told: dict[str, Any], journal: JournalWriter, say: Callable[[str], None], *, rank: int = 0
    ) -> None:
        self._told = told
        self._number = int(told["step"])
        self._journal = journal
        self._say = say
        self._rank = rank
        self._handles: list[Any] = []
        self._watch: Any = None
        self._watched: int | None = None
        self._report: Any = None
        self._steps: dict[int, int] = {}
        self._made = False
        self._compiled = False
        self._backwards = 0
        self._why: str | None = None

    def begin(self) -> None:
        """Begin to wait for the step; torch has been imported."""
        self._handles = [
            _taps.optimizer_created.subscribe(self._around_created, order="measure"),
            _taps.optimizer_step.subscribe(after=self._stepped, order="measure"),
            _taps.engine.subscribe(self._around_engine, order="measure"),
            _taps.compile.subscribe(self._around_compile, order="measure"),
        ]

    def end(self) -> None:
        """Say what was found; a second call says nothing."""
        if not self._handles:
            return
        self._take_back()
        if self._watch is not None:
            self._let_go()
            self._why = f"the script ended in step {self._number}"
        if self._rank:
            return
        if self._report is not None:
            self._say(f"gradctl: memory of step {self._number}\n{self._report}")
        else:
            self._say(f"gradctl: no step was measured: {self._why or self._too_few()}")

    def drop(self) -> None:
        """In a forked child: measure nothing."""
        self._take_back()
        self._watch = None

    def _too_few(self) -> str:
        most = max(self._steps.values(), default=0)
        if most:
            return (
                f"the script made {most} optimizer step{'s' if most > 1 else ''}, and step {self._number} was to be "
                "measured (--step N, 2 or more)"
            )
        return f"it made no optimizer step, and {self._backwards} backwards"

    def _take_back(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _around_created(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def created(*args: Any, **kwargs: Any) -> Any:
            self._made = True
            return inner(*args, **kwargs)

        return created

    def _around_compile(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def compile_(*args: Any, **kwargs: Any) -> Any:
            self._compiled = True
            return inner(*args, **kwargs)

        return compile_

    def _around_engine(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run_backward(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            self._backwards += 1
            if not self._made and not self._steps:
                past = self._backwards - max(_BACKWARDS, self._number - 1)
                if past == 0:
                    self._start(None)
                elif past == 1:
                    self._stop()
            return found

        return run_backward

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        self._steps[key] = self._steps.get(key, 0) + 1
        if self._report is not None or self._why is not None:
            return
        if self._watch is not None and key == self._watched:
            self._stop()
        elif self._watch is None and self._steps[key] == self._number - 1:
            self._start(key)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _start(self, key: int | None) -> None:
        try:
            if private.get("dispatch_mode_depth")():
                self._why = "a dispatch mode of the program is on, and ours could not be taken away under it"
                return
            fit = importlib.import_module("gradctl._fit")
            optimizers = [one for one in gc.get_objects() if issubclass(type(one), _optimizer_class())]
            watch = fit.StepWatch((), optimizers)
            watch.begin()
        except Exception as fault:
            self._why = _words(fault)
            return
        self._watch, self._watched = watch, key

    def _let_go(self) -> Any:
        watch, self._watch = self._watch, None
        try:
            return watch.end()
        except Exception as fault:
            self._why = _words(fault)
            return None

    def _stop(self) -> None:
        facts = self._let_go()
        if facts is None:
            return
        try:
            fit = importlib.import_module("gradctl._fit")
            report = fit.report_of(facts)
            if self._compiled:
                report = report.noting("what torch.compile has compiled was run, and measured, uncompiled")
            self._report = report
            self._journal.event("memory", n=self._number, **_shortened(report.to_json()))
            if not self._rank:
                self._keep(fit, facts)
        except Exception as fault:
            self._why = _words(fault)

    def _keep(self, fit: Any, facts: Any) -> None:
        data = self._report.to_json()
        try:
            if self._told.get("descriptor") is not None:
                with os.fdopen(os.dup(int(self._told["descriptor"])), "w", encoding="utf-8") as file:
                    json.dump(data, file, indent=2)
                    file.write("\n")
            elif self._told.get("json"):
                with open(self._told["json"], "x", encoding="utf-8") as file:
                    json.dump(data, file, indent=2)
                    file.write("\n")
            if self._told.get("pickle"):
                fit.write_pickle(facts, self._told["pickle"], self._report.device)
        except Exception as fault:
            self._say(f"gradctl: the report was not kept: {_words(fault)}")


def _optimizer_class() -> Any:
    return importlib.import_module("torch").optim.Optimizer


def _shortened(data: dict[str, Any]) -> dict[str, Any]:
    """Leave out what no page shows: the smallest places."""
    return {key: value[:_ROWS] if key in ("alive", "saved_by_module", "saved_by_line", "avoidable") else value
            for key, value in data.items()}  # fmt: skip


def _words(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {str(fault)[:300]}"


def metered(
    told: dict[str, Any] | None, journal: JournalWriter, say: Callable[[str], None], *, rank: int
) -> Metered | None:
    """Return what measures a step, if that was asked for.

    Args:
        told: see `Metered`; None where no step is measured.
        journal: see `Metered`, as the two that follow.
        say: as there.
        rank: as there.
    """
    return None if told is None else Metered(told, journal, say, rank=rank)
