"""The script's side of `gradctl explain` and `gradctl fit`: what watches its main process, and what it leaves.

The other side, which starts the script and reads the result, is `_explaining.py` and `_fitting.py`. Nothing here
prints, and nothing raises into the script.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from gradctl import __version__, _taps
from gradctl._run import _exit_status

_TEMPORARY = ("tempfile.mkdtemp", "tempfile.mkstemp")


FIT: Final = "fit"
"""The stage of `gradctl fit`, which runs the script once."""


class Watcher(Protocol):
    """What watches the script: the sentinel of explain's first run, the tracer of its second, or what fits a model."""

    def begin(self) -> None:
        """Start to watch; torch has been imported."""

    def end(self, error: BaseException | None) -> dict[str, Any]:
        """Stop, put everything back and return what the result is to hold."""
        ...

    def drop(self) -> None:
        """Stop in a forked child, which reports nothing."""


class _FirstRun:
    def __init__(self, told: dict[str, Any]) -> None:
        from gradctl._explain import Sentinel

        self._sentinel = Sentinel(into=told["into"])

    def begin(self) -> None:
        self._sentinel.install()

    def end(self, error: BaseException | None) -> dict[str, Any]:
        return dict(self._sentinel.finish(error))

    def drop(self) -> None:
        return  # its hooks are those of an optimizer step: cheap, and gone with the process


class _TracedRun:
    def __init__(self, told: dict[str, Any], script: str | None, on_done: Callable[[], None]) -> None:
        from gradctl._explain import Tracing

        self._tracing = Tracing(
            into=told["into"],
            script=script,
            steps=told["steps"],
            at_step=told["at_step"],
            notes=told["notes"],
            symptoms=told["symptoms"],
            on_done=on_done if told["may_end"] else None,
        )

    def begin(self) -> None:
        self._tracing.start()

    def end(self, error: BaseException | None) -> dict[str, Any]:
        try:
            found: dict[str, Any] = {
                "findings": [finding.to_json() for finding in self._tracing.findings(error)],
                "steps": self._tracing.steps,
                "backwards": len(self._tracing.context.facts.backwards),
            }
        finally:
            self._tracing.stop()
        return found | {"faults": list(self._tracing.faults)}

    def drop(self) -> None:
        self._tracing.stop()


class _Fitted:
    def __init__(self, told: dict[str, Any], on_done: Callable[[], None]) -> None:
        from gradctl._fit import ScriptFit

        self._fit = ScriptFit(told["memory"], on_done)

    def begin(self) -> None:
        self._fit.start()

    def end(self, error: BaseException | None) -> dict[str, Any]:
        fit = self._fit
        fit.stop()
        found: dict[str, Any] = {
            "steps": fit.steps,
            "model": None if fit.model is None else type(fit.model).__name__,
            "remarks": fit.remarks,
        }
        if fit.refused is not None:
            refused = fit.refused
            found["refused"] = {"text": str(refused), "smallest": getattr(refused, "smallest", None)}
        if fit.plan is not None:
            found |= {"plan": fit.plan.to_json(), "text": str(fit.plan)}
        return found | {"faults": fit.faults}

    def drop(self) -> None:
        self._fit.stop()


class Explaining:
    """Watches this process for `gradctl explain` or `gradctl fit` and writes the result when it ends, in whichever way.

    Args:
        settings: what GRADCTL_RUN says.
        leaving: see `_attach.Listening`.
    """

    def __init__(self, settings: dict[str, Any], leaving: Any) -> None:
        self._told: dict[str, Any] = settings["explain"]
        self._leaving = leaving
        self._watcher: Watcher | None = None
        self._faults: list[str] = []
        self._ended = False
        self._temporary: list[str] = []
        self._script = script()

    def begin(self) -> None:
        """Begin to watch; what fails is left in the result, and the script goes on."""
        try:
            if self._told["stage"] == FIT:
                self._watcher = _Fitted(self._told, self._explained)
            elif self._told["stage"] == 1:
                self._watcher = _FirstRun(self._told)
            else:
                self._watcher = _TracedRun(self._told, self._script, self._explained)
            self._watcher.begin()
        except Exception as fault:
            self._faults.append(_words(fault))
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=self._forked)
        _taps.os_exit.subscribe(self._around_os_exit, order="measure")
        if self._told["stage"] != 1:
            sys.addaudithook(self._note_temporary)

    def end(self, how: str, code: int | None, error: BaseException | None) -> None:
        """Stop watching and write the result; only once."""
        if self._ended:
            return
        self._ended = True
        found: dict[str, Any] = {}
        try:
            if self._watcher is not None:
                found = self._watcher.end(error)
        except Exception as fault:
            self._faults.append(_words(fault))
        faults = [*found.pop("faults", ()), *self._faults]
        write(self._told["result"], how=how, code=code, error=error, script=self._script, faults=faults, **found)

    def _at_exit(self) -> None:
        try:
            self.end("exit", _exit_status.code(self._leaving.status()), _exit_status.last_error())
        finally:
            _exit_status.keep_interrupt()

    def _around_os_exit(self, inner: Any) -> Any:
        def leave(status: int) -> None:
            try:
                self.end("os._exit", status, _exit_status.last_error() or sys.exc_info()[1])
            finally:
                inner(status)

        return leave

    def _explained(self) -> None:
        """End the process in the middle of a step: there is nothing more to learn from it."""
        if self._ended:
            return
        self.end("done", 0, None)
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:  # pyright: ignore[reportUnnecessaryComparison]  (closed by the script)
                    stream.flush()
            except (OSError, ValueError):
                continue
        # The script does not come to its own clearing up; what it wrote elsewhere, it wrote in the first run too.
        for path in self._temporary:
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)
        os._exit(0)

    def _note_temporary(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _TEMPORARY and not self._ended:
            self._temporary.append(os.path.abspath(os.fsdecode(arguments[0])))

    def _forked(self) -> None:
        ended, self._ended = self._ended, True
        self._temporary.clear()
        if self._watcher is not None and not ended:
            try:
                self._watcher.drop()
            except Exception as fault:
                self._faults.append(_words(fault))  # nobody asks a child


_explaining: Explaining | None = None


def begin(settings: dict[str, Any], leaving: Any) -> None:
    """Watch this process; only the script's main process leaves a result.

    Args:
        settings: what GRADCTL_RUN says.
        leaving: see `_attach.Listening`.
    """
    global _explaining
    if _explaining is None and settings["main_pid"] == os.getpid():
        _explaining = Explaining(settings, leaving)
        _explaining.begin()


def main_process_ends(settings: dict[str, Any], status: tuple[Any, ...] | None) -> None:
    """Leave a result where the script has never imported torch, or could not be watched."""
    if _explaining is None:
        error = _exit_status.last_error()
        write(settings["explain"]["result"], how="exit", code=_exit_status.code(status), error=error, script=script())
        _exit_status.keep_interrupt()


def write(
    path: str,
    *,
    how: str,
    code: int | None,
    error: BaseException | None,
    script: str | None,
    **found: Any,
) -> None:
    """Write the result, whole or not at all.

    Args:
        path: the file.
        how: `exit`, `os._exit`, or `done` when the tracer has learned enough.
        code: the exit code, if it can be known.
        error: the exception that ends the process.
        script: absolute path of the file that runs as `__main__`.
        found: what the watcher says.
    """
    torch = sys.modules.get("torch")
    versions = {"gradctl": __version__, "python": platform.python_version()}
    if torch is not None:
        versions["torch"] = str(getattr(torch, "__version__", ""))
    # Before torch is there, nothing can be about gradients, and to ask would load it.
    about_gradients = error is not None and torch is not None and _is_about_gradients(error)
    result = {
        "how": how,
        "code": code,
        "error": None if error is None else _exit_status.describe(error) | {"gradient": about_gradients},
        "script": script,
        "torch": torch is not None,
        "versions": versions,
        **found,
    }
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(result, file, default=str)
        os.replace(part, path)
    except OSError:
        return  # whoever waits for it sees that there is none


def _is_about_gradients(error: BaseException) -> bool:
    try:
        from gradctl._explain._gradient_errors import is_gradient_error

        return is_gradient_error(error)
    except Exception:
        return False  # the script's own class, which cannot say what it is


def script() -> str | None:
    """Return the absolute path of the file that runs as `__main__`; None where it is no file."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return os.path.abspath(file) if isinstance(file, str) and not file.startswith("<") else None


def _words(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {str(fault)[:300]}"
