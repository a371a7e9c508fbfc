"""`gradctl.watch`: trace the next steps of a program that is running, and say what is wrong with its gradients."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from gradctl._errors import UsageError
from gradctl._explain._tracing import Tracing
from gradctl._results import Findings


def watch(
    model: Module | None = None,
    optimizer: Optimizer | None = None,
    steps: int | None = None,
    *,
    into: Sequence[str] = (),
    notes: bool = False,
    quiet: bool = False,
) -> Watch:
    """Trace the next steps of a running program, and report what is wrong with its gradients.

    Use the result as a context manager, or call `start()` and `stop()`. While it is traced a program runs eagerly
    (`torch.compile` is bypassed) and slower, and its numbers stay the same bit by bit. After `steps` optimizer steps,
    at the end of the block, or when an error leaves it, the findings go to stderr and into `findings`; the error goes
    on. Nothing stays behind.

    Args:
        model: gives parameters their names; without it they are looked for.
        optimizer: what it holds is asked for a gradient even if it never steps.
        steps: stop tracing after so many optimizer steps; None is until the end.
        into: installed packages that count as your own code.
        notes: also tell of breaks that do no harm.
        quiet: print nothing.

    Returns:
        The watch, not yet started.

    Raises:
        UsageError: an argument does not fit.
    """
    check(model, optimizer)
    if steps is not None and (type(steps) is not int or steps < 1):
        raise UsageError(
            f"watch(steps={steps!r})", why="it counts optimizer steps", fix="a whole number above 0, or None"
        )
    return Watch(model, optimizer, steps, into, notes, quiet)


class Watch:
    """A traced stretch of a running program.

    Attributes:
        findings: what was found; empty until it has ended.
    """

    def __init__(
        self,
        model: Module | None,
        optimizer: Optimizer | None,
        steps: int | None,
        into: Sequence[str],
        notes: bool,
        quiet: bool,
    ) -> None:
        self.findings = Findings()
        self._model = model
        self._optimizer = optimizer
        self._limit = steps
        self._into = tuple(into)
        self._notes = notes
        self._quiet = quiet
        self._tracing: Tracing | None = None
        self._ended = False

    @property
    def running(self) -> bool:
        """Whether the program is being traced now."""
        return self._tracing is not None and not self._ended

    @property
    def steps(self) -> int:
        """Number of optimizer steps that were traced."""
        return self._tracing.steps if self._tracing is not None else 0

    @property
    def faults(self) -> list[str]:
        """Why tracing switched itself off, if it did."""
        return self._tracing.faults if self._tracing is not None else []

    def start(self) -> Watch:
        """Begin to trace.

        Raises:
            UsageError: it has been started before, or this process is being traced already.
        """
        if self._tracing is not None:
            raise UsageError("this watch has been started before", fix="make another: gradctl.watch(...)")
        tracing = Tracing(into=self._into, script=script(), steps=self._limit, notes=self._notes, on_done=self._done)
        tracing.start()
        self._tracing = tracing
        name_parameters(tracing, self._model)
        atexit.register(self._at_exit)
        return self

    def stop(self) -> Findings:
        """Stop tracing, take everything back, and report; a second call only returns the findings."""
        self.end(None)
        return self.findings

    def __enter__(self) -> Watch:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    def _done(self) -> None:
        self.end(None)

    def _at_exit(self) -> None:
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Stop as `stop` does, and explain an error.

        Args:
            error: what ended the watched steps, or None.
        """
        tracing = self._tracing
        if tracing is None or self._ended:
            return
        self._ended = True
        atexit.unregister(self._at_exit)
        self.findings = watched(tracing, error, self._optimizer)
        if not self._quiet and sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]
            print(f"gradctl: {self.findings}", file=sys.stderr)


def watched(tracing: Tracing, error: BaseException | None, optimizer: Optimizer | None = None) -> Findings:
    """End a trace and return what it has found, with what a reader must know besides.

    Args:
        tracing: the trace; it is stopped whatever happens.
        error: what ended the watched steps, or None.
        optimizer: what it holds is asked for a gradient even if it has never stepped.
    """
    try:
        if error is None and optimizer is not None:
            tracing.ask(optimizer)
        found = tracing.findings(error)
    finally:
        tracing.stop()
    steps = tracing.steps
    remarks = [f"the tracer switched itself off: {fault}" for fault in tracing.faults]
    if not steps and error is None:
        remarks.append("no optimizer has made a step while it was watched")
    subject = f"{steps} {'step' if steps == 1 else 'steps'}"
    return Findings(found, remarks=remarks, folder=tracing.context.folder, subject=subject)


def check(model: object, optimizer: object) -> None:
    """Check what a caller says to be a model and an optimizer.

    Raises:
        UsageError: it is something else, or holds no parameters.
    """
    if model is not None:
        if not isinstance(model, Module):
            raise UsageError(f"model is a {type(model).__name__}, not a torch.nn.Module", fix="pass the model itself")
        if next(model.parameters(), None) is None:
            raise UsageError(
                f"this {type(model).__name__} has no parameters",
                why="layers kept in a plain list or dict are not registered with it",
                fix="use torch.nn.ModuleList or torch.nn.ModuleDict; see `gradctl cause unregistered_module`",
            )
    if optimizer is not None:
        groups = getattr(optimizer, "param_groups", None)
        if not isinstance(groups, list):
            kind = type(optimizer).__name__
            raise UsageError(f"optimizer is a {kind}, not a torch.optim.Optimizer", fix="pass the optimizer itself")
        if not any(group["params"] for group in groups):
            raise UsageError(
                f"this {type(optimizer).__name__} holds no parameters",
                why="it was built from something empty",
                fix="pass it model.parameters(); see `gradctl cause empty_optimizer`",
            )


def name_parameters(tracing: Tracing, model: Module | None) -> None:
    """Tell the trace the names of a model's parameters."""
    if model is not None:
        tracing.name({id(parameter): name for name, parameter in model.named_parameters()})


def folder() -> str:
    """Return the folder that places are written relative to."""
    file = script()
    return os.getcwd() if file is None else os.path.dirname(file)


def script() -> str | None:
    """Return the file that runs as the program; None in a notebook and in an interactive session."""
    file: Any = getattr(sys.modules.get("__main__"), "__file__", None)
    if not isinstance(file, str) or "site-packages" in file or os.path.basename(file) in ("pytest", "__main__.py"):
        return None
    return os.path.abspath(file)
