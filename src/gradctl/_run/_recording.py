"""`gradctl.record()`: the same recorder for programs that start themselves, notebooks among them."""

from __future__ import annotations

import atexit
import html
import importlib
import io
import os
import re
import sys
import traceback
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gradctl import _journal, _policy, _taps
from gradctl._errors import UsageError
from gradctl._journal import Journal, Run
from gradctl._policy import Grad, OnNonfinite, Policy
from gradctl._run import _at_exit, _directory, _launcher, _unseen
from gradctl._run._nonfinite import NonfiniteExplainer, explainer
from gradctl._run._planned import Planned, planned
from gradctl._run._process import ProcessJournal
from gradctl._run._redact import redact
from gradctl._run._watched import StepWatcher, watcher

_current: Recording | None = None


def record(
    out: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    plan: str | os.PathLike[str] | None = None,
    report: bool | None = None,
    quiet: bool | None = None,
    watch_steps: int | None = None,
    on_nonfinite: OnNonfinite | None = None,
    lines: bool | None = None,
    budget: float | None = None,
    grad: Grad | None = None,
    force: bool | None = None,
) -> Recording:
    """Record what gradients do from here on, until the recording is stopped or the process ends.

    Recording begins with the call. Use the result as a context manager, or keep it and call `stop()`. What is None
    comes from the policy file. In a program that `gradctl run` has started, that run is already recording: the result
    shows its journal, and stopping it does nothing. How it records was said on the command line: `out`, `grad`,
    `watch_steps`, `on_nonfinite`, `lines` and `budget` must agree with that, and `name`, `report`, `quiet` and `force`
    mean nothing.

    Args:
        out: the run directory; by default `gradctl-runs/<script>-<UTC time>[-NAME]`.
        name: a word that ends the name of the run directory.
        plan: a plan of `gradctl fit`, applied to its model until the recording is stopped.
        report: write `report.html` when the recording stops.
        quiet: do not say on stderr where the report is.
        watch_steps: record only the first steps of each optimizer, and trace them: what is wrong with their gradients
            goes to stderr with its line.
        on_nonfinite: `stop` raises `NonFiniteGradient` before a NaN or inf gradient is applied; `explain` traces the
            steps after the first one and says which line makes it, if it comes again.
        lines: record saved bytes by source line.
        budget: most of the wall time that sampling may use, as a share between 0 and 1.
        grad: `off` switches gradients off until the recording stops, as `gradctl.off()` does.
        force: write into a run directory that already holds a run.

    Returns:
        The recording.

    Raises:
        UsageError: this process is recording already, an argument does not fit, or it differs from the `gradctl run`
            that has started this program.
        RunDirectoryError: the run directory holds something already, or cannot be made.
    """
    global _current
    keywords = {
        "out": os.fspath(out) if out is not None else None,
        "name": name,
        "plan": os.fspath(plan) if plan is not None else None,
        "report": report,
        "quiet": quiet,
        "watch_steps": watch_steps,
        "on_nonfinite": on_nonfinite,
        "lines": lines,
        "budget": budget,
        "grad": grad,
        "force": force,
    }
    policy = _policy.resolve(keywords=keywords)
    importlib.import_module("torch")  # under `gradctl run` this makes the run listen, if it does not yet
    from gradctl._run import _attach

    run = _attach.listening()
    if run is not None:
        _check_agreement({key for key, value in keywords.items() if value is not None}, policy, run.settings)
        return Recording(run.journal, run.recorder, policy, joined=True)
    if _current is not None:
        raise UsageError(
            "this process is recording already",
            what=f"into {_current.directory}",
            fix="stop the first recording before the next one starts: recording.stop()",
        )
    _current = _begin(policy)
    return _current


def _check_agreement(given: set[str], policy: Policy, settings: Mapping[str, Any]) -> None:
    """Refuse keywords that ask for something else than the run that is recording already."""
    for key in ("out", "plan", "grad", "watch_steps", "on_nonfinite", "lines", "budget"):
        asked, runs = getattr(policy, key), settings[key]
        if key == "plan":
            agrees = (None if asked is None else os.path.abspath(asked)) == runs
        elif key == "out":
            asked = None if asked is None else os.path.abspath(asked)
            # On a further host, and after a restart by the launcher, the run's own name for it is longer.
            agrees = re.fullmatch(rf"{re.escape(asked or '')}(-node\d+)?(-restart\d+)?", runs) is not None
        else:
            agrees = asked == runs
        if key in given and not agrees:
            flag = f"--{key.replace('_', '-')}" + ("" if key == "lines" else f" {asked}")
            raise UsageError(
                f"record({key}={asked!r}) differs from the `gradctl run` that has started this program",
                what=f"that run was started with {key}={runs!r}, and is recording",
                fix=f"leave {key} out of record()" + (f", or start it with gradctl run {flag}" if asked else ""),
            )


class Recording:
    """A recording of this process.

    Attributes:
        directory: the run directory, with the journal and, once stopped, `report.html`.
    """

    def __init__(self, journal: ProcessJournal, recorder: Any, policy: Policy, *, joined: bool) -> None:
        self.directory: Path = journal.directory
        self._writer = journal
        self._recorder = recorder
        self._policy = policy
        self._running = not joined
        self._joined = joined
        self._handles: list[Any] = []
        self._switch: Any = None
        self._explainer: NonfiniteExplainer | None = None
        self._watcher: StepWatcher | None = None
        self._planned: Planned | None = None

    @property
    def journal(self) -> Journal:
        """What this process has recorded so far, read from its file."""
        self._bring_up_to_date()
        return _journal.read(self._writer.path)

    def summary(self) -> dict[str, Any]:
        """Return the summary `gradctl.summary/1` of what has been recorded so far."""
        from gradctl import report

        return report.summary(self._load())

    def stop(self) -> None:
        """Stop recording, take back everything that was installed, and write the report; a second call does nothing."""
        self._stop("stopped", None)

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop("stopped", error)

    def __str__(self) -> str:
        from rich.console import Console

        from gradctl import report

        text = io.StringIO()
        report.draw_terminal(self._load(), console=Console(file=text, width=100, highlight=False))
        return text.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        state = "belongs to `gradctl run`" if self._joined else "running" if self._running else "stopped"
        return f"<Recording {self.directory} ({state})>"

    def _repr_html_(self) -> str:
        page = self.directory / "report.html"
        if not self._running and page.is_file():
            text = html.escape(page.read_text(encoding="utf-8"), quote=True)
            return f'<iframe srcdoc="{text}" style="width:100%;height:80vh;border:0"></iframe>'
        return f"<pre>{html.escape(str(self))}</pre>"

    def _load(self) -> Run:
        self._bring_up_to_date()
        return Run.load(self.directory)

    def _bring_up_to_date(self) -> None:
        if self._running or self._joined:
            self._recorder.drain()
            if not self._writer.started:
                self._writer.begin()
            self._writer.flush()

    def _stop(self, how: str, error: BaseException | None) -> None:
        global _current
        if not self._running:
            return
        self._running = False
        if _current is self:
            _current = None
        atexit.unregister(self._at_exit)
        for handle in self._handles:
            handle.remove()
        if self._switch is not None:
            self._switch.remove()
        is_child = self._writer.start == "child"
        self._recorder.settle()
        if self._explainer is not None:
            self._explainer.stop()
        if self._planned is not None:
            self._planned.end()
            self._planned.undo()
        if self._watcher is not None:
            self._watcher.end(error)
        if is_child and not self._writer.started:
            self._writer.discard()  # a forked child that has recorded nothing leaves no file
        from gradctl._run import _exit_status

        exc = None if error is None else _exit_status.describe(error)
        self._recorder.finish(how, code=None, exc=exc)
        self._writer.close()
        _journal.set_current(None)
        if not is_child:
            self._report()

    def _report(self) -> None:
        rank = _launcher.find(os.environ)
        if not rank.draws:
            return
        _at_exit.wait_for_ranks(self.directory, rank.rank)
        _directory.tidy(self.directory)
        if not self._policy.report:
            return
        from gradctl import report

        page = self.directory / "report.html"
        try:
            report.write_page(Run.load(self.directory), page)
        except Exception as fault:  # a report that cannot be drawn is no reason to end the program
            where = traceback.extract_tb(fault.__traceback__)[-1]
            _at_exit.say(f"gradctl: the report could not be drawn: {fault!r} at {where.filename}:{where.lineno}")
            return
        if not self._policy.quiet and rank.rank == 0:
            _at_exit.say(f"gradctl: report  {page}")

    def _at_exit(self) -> None:
        from gradctl._run import _exit_status

        try:
            self._stop("exit", _exit_status.last_error())
        finally:
            _exit_status.keep_interrupt()

    def _around_os_exit(self, inner: Any) -> Any:
        def leave(status: int) -> None:
            try:
                self._stop("os._exit", None)
            finally:
                inner(status)

        return leave

    def _forked(self) -> None:
        if self._explainer is not None:
            self._explainer.drop()
        if self._watcher is not None:
            self._watcher.drop()
        if self._planned is not None:
            self._planned.drop()
        self._writer.forget()
        self._recorder.after_fork_in_child()


def _begin(policy: Policy) -> Recording:
    from gradctl._record import Recorder

    rank = _launcher.find(os.environ)
    script = _script()
    directory = _directory.make(policy, script, rank)
    settings: Mapping[str, Any] = {
        "argv": redact(sys.argv),
        "script": script,
        "grad": policy.grad,
        "budget": policy.budget,
    }
    journal = ProcessJournal(
        directory,
        settings,
        start="record",
        on_failure=lambda reason: (
            None
            if policy.quiet
            else _at_exit.say(f"gradctl: recording stops, the program goes on: {directory}: {reason}")
        ),
    )
    recorder = Recorder(
        journal,
        budget=policy.budget,
        on_nonfinite=policy.on_nonfinite,
        watch_steps=policy.watch_steps,
        lines=policy.lines,
    )
    recording = Recording(journal, recorder, policy, joined=False)

    def say(text: str) -> None:
        if not policy.quiet:
            _at_exit.say(text)

    recording._watcher = watcher(policy.watch_steps, journal, None, say, grad=policy.grad, rank=rank.rank)
    # What is watched is traced from the beginning, a gradient that is not finite with the rest.
    recording._explainer = explainer(
        policy.on_nonfinite if recording._watcher is None else "continue", journal, script, say
    )
    if recording._explainer is not None:
        journal.on_event = recording._explainer.heard
    recorder.install()
    if policy.grad == "off":
        from gradctl._off import off

        recording._switch = off().start()
    _journal.set_current(journal)
    recording._handles = [
        _taps.os_exit.subscribe(recording._around_os_exit, order="measure"),
        _unseen.listen(journal),
    ]
    atexit.register(recording._at_exit)
    _recordings.add(recording)
    recording._planned = planned(None if policy.plan is None else os.path.abspath(policy.plan), journal, say)
    if recording._planned is not None:
        recording._planned.begin()
    if recording._watcher is not None:
        recording._watcher.begin()
    return recording


_recordings: weakref.WeakSet[Recording] = weakref.WeakSet()


def _forked() -> None:
    for recording in tuple(_recordings):
        if recording._running:
            recording._forked()


# A fork handler cannot be taken back: one for all recordings of this process.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _script() -> str:
    if "ipykernel" in sys.modules or "IPython" in sys.modules:
        return "notebook"
    word = sys.argv[0] if sys.argv else ""
    return {"": "interactive", "-c": "command", "-": "stdin"}.get(word) or os.path.basename(word)
