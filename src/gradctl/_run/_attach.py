"""Begin to listen in a process, once its torch has been imported, and end when the process does.

Called by `_site/sitecustomize.py`. Nothing here prints into the script's output or raises into it.
"""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path
from typing import Any

from gradctl import __version__, _journal, _taps
from gradctl._run import _at_exit, _exit_status, _traced, _unseen
from gradctl._run._metered import metered
from gradctl._run._nonfinite import explainer
from gradctl._run._planned import planned
from gradctl._run._process import ProcessJournal
from gradctl._run._watched import watcher


class Listening:
    """What listens in this process: the recorder, its journal and the switch.

    Args:
        settings: what GRADCTL_RUN says.
        leaving: tells in `status()` what `sys.exit` was given, once the interpreter goes down; see `_exit_status`.
    """

    def __init__(self, settings: dict[str, Any], leaving: Any) -> None:
        from gradctl._record import Recorder

        self.settings = settings
        self._leaving = leaving
        self.is_main = settings["main_pid"] == os.getpid()
        told = settings.get("memory")
        self.journal = ProcessJournal(
            Path(settings["out"]),
            settings,
            start="run" if self.is_main else "child",
            on_failure=self._journal_failed,
        )
        self.recorder = Recorder(
            self.journal,
            budget=settings["budget"],
            on_nonfinite=settings["on_nonfinite"],
            # Of a run whose memory is measured, the steps before: a recorder allocates too.
            watch_steps=settings["watch_steps"] if told is None else told["step"] - 1,
            lines=settings["lines"],
        )
        self._watcher = (
            watcher(
                settings["watch_steps"],
                self.journal,
                _traced.script(),
                self._say,
                grad=settings["grad"],
                rank=settings["rank"],
            )
            if self.is_main
            else None
        )
        # What is watched is traced from the beginning, a gradient that is not finite with the rest.
        policy = settings["on_nonfinite"] if self._watcher is None else "continue"
        self._explainer = explainer(policy, self.journal, settings["script"], self._say)
        if self._explainer is not None:
            self.journal.on_event = self._explainer.heard
        self._metered = metered(told, self.journal, self._say, rank=settings["rank"]) if self.is_main else None
        self._planned = planned(settings.get("plan"), self.journal, self._say) if self.is_main else None
        self._ended = False

    def begin(self) -> None:
        """Install what listens, and switch gradients off where that was asked for."""
        self.recorder.install()
        if self.settings["grad"] == "off":
            from gradctl._off import start_from_environment

            start_from_environment("the command line: gradctl run --grad off")
        _journal.set_current(self.journal)
        # Registered while torch is being imported: the script's own handlers, which come later, run before it.
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=self._forked)
        _taps.os_exit.subscribe(self._around_os_exit, order="measure")
        _unseen.listen(self.journal)
        if self._watcher is not None:
            self._watcher.begin()
        if self._metered is not None:
            self._metered.begin()
        if self._planned is not None:
            self._planned.begin()

    def end(self, how: str, code: int | None) -> None:
        """Write the end record; only once, and not in a child that has recorded nothing."""
        if self._ended:
            return
        self._ended = True
        if self._metered is not None:
            self._metered.end()
        self.recorder.settle()
        if self._explainer is not None:
            self._explainer.stop()
        if self._planned is not None:
            self._planned.end()
        if self._watcher is not None:
            self._watcher.end(_exit_status.last_error())
        if self.is_main or self.journal.started:
            self.recorder.finish(how, code=code, exc=_exit_status.exception())
            self.journal.close()
        _journal.set_current(None)

    def _at_exit(self) -> None:
        status = self._leaving.status() if self.is_main else None
        try:
            self.end("exit", _exit_status.code(status))
        finally:
            _exit_status.keep_interrupt()

    def _around_os_exit(self, inner: Any) -> Any:
        def leave(status: int) -> None:
            try:
                self.end("os._exit", status)
                if self.is_main:
                    _at_exit.main_process_ends(self.settings, (status,))
            finally:
                inner(status)

        return leave

    def _forked(self) -> None:
        self.is_main = False
        self._ended = False
        if self._explainer is not None:
            self._explainer.drop()
        if self._watcher is not None:
            self._watcher.drop()
        if self._planned is not None:
            self._planned.drop()
        if self._metered is not None:
            self._metered.drop()
        self.journal.forget()
        self.recorder.after_fork_in_child()
        self.journal.forget()
        _journal.set_current(self.journal)

    def _journal_failed(self, reason: str) -> None:
        self._say(f"gradctl: recording stops, the script goes on: {self.journal.path}: {reason}")

    def _say(self, text: str) -> None:
        if self.is_main and not self.settings["quiet"]:
            _at_exit.say(text)


_listening: Listening | None = None


def attach(run: str, leaving: Any) -> None:
    """Begin to listen in this process; a second call does nothing.

    Args:
        run: the text of GRADCTL_RUN.
        leaving: see `Listening`.

    Raises:
        RuntimeError: the program uses a gradctl of another version than the one that started it.
    """
    global _listening
    if _listening is not None:
        return
    settings = json.loads(run)
    if settings["version"] != __version__:
        raise RuntimeError(f"the run was started by gradctl {settings['version']}, this is {__version__}")
    told = settings.get("explain")
    if told is None or told["stage"] == 1:
        _listening = Listening(settings, leaving)
        _listening.begin()
    if told is not None:
        _traced.begin(settings, leaving)


def listening() -> Listening | None:
    """Return what listens in this process, if `gradctl run` has started it."""
    return _listening
