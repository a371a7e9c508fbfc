"""`gradctl explain`: run the script with a sentinel, run it again with a tracer where that is needed, and conclude.

The other side, inside the script, is `_traced.py`. What the two runs mean is `_outcome.py`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from gradctl._errors import GradctlError, UsageError
from gradctl._policy import Policy
from gradctl._results import Explanation
from gradctl._run import _launcher, _outcome, _together
from gradctl._run._module import check_module
from gradctl._run._outcome import Options, Ran
from gradctl._run._stage import Interrupted, Streams, Waiting, spawn
from gradctl._run._start import UNSEEN, check_script, display_name, hiding, module_of, split, told
from gradctl._run._stdin import Input

_SHOWN_LINES = 30
_AGAIN = (
    "gradctl: {why} Running the script again, traced{how}: what it does to files and services happens a second time "
    "(--no-rerun forbids that)."
)
_WHY = "something may be wrong with the gradients."
_ASKED = "nothing is wrong so far."
_NO_TERMINAL = ", with an empty input instead of the terminal"
_TYPED = "it reads from the terminal, and what is typed cannot be typed again: give it a file (... < answers.txt)"


def explain(command: Sequence[str], script: str, options: Options) -> Explanation | None:
    """Run a script, find out whether its gradients are sound, and if they are not, which line is to blame.

    Args:
        command: what the interpreter gets: its own flags, then SCRIPT, `-m MODULE` or `-c CODE`, then their arguments.
        script: what stands for the script in `command`.
        options: how to look.

    Returns:
        What was found; None in a rank of a launched job that leaves it to another to say so.

    Raises:
        GradctlError: this system cannot start a process in this way.
        UsageError: there is no such script or module, it is not a Python program, or gradctl cannot be found in it.
    """
    if os.name != "posix":
        raise GradctlError(
            "gradctl explain works on Linux and macOS only", why="a script cannot be started in the same way here"
        )
    flags, kind = split(command, script)
    if kind == "file":
        check_script(script, verb="explain")
    module, safe_path = module_of(command, script)
    if module is not None:
        check_module(module, verb="explain", safe_path=safe_path)
    lost = hiding(flags)
    if lost is not None:
        raise UsageError(f"nothing can be explained under `python -{lost}`", why=UNSEEN[lost], fix=f"leave -{lost} out")
    rank = _launcher.find(os.environ)
    waiting = Waiting()
    try:
        with waiting.held(), _together.place(rank, full=options.full, pause=waiting.pause) as place:
            return _Stages(list(command), command[len(flags) :], script, options, waiting, place).explain()
    except Interrupted as interrupted:
        _end_by(interrupted.signum)


def _end_by(signum: int) -> NoReturn:
    """End as the signal would have ended this process, now that everything is cleared away."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    raise AssertionError("a process outlived its own signal")


class _Stages:
    """The one or two runs of a script.

    Args:
        command: the interpreter's command line.
        arguments: the part of it from SCRIPT on.
        script: what stands for the script.
        options: how to look.
        waiting: holds back this process's signals.
        place: where the files of the runs lie, and the other ranks.
    """

    def __init__(
        self,
        command: list[str],
        arguments: Sequence[str],
        script: str,
        options: Options,
        waiting: Waiting,
        place: _together.Place,
    ) -> None:
        self._command = command
        self._arguments = arguments
        self._script = script
        self._options = options
        self._waiting = waiting
        self._place = place
        self._input = Input(keep=options.rerun and not options.full)

    def explain(self) -> Explanation | None:
        try:
            first = None if self._options.full else self._first()
            second = None
            if first is None:
                second = self._traced(symptoms=(), hidden=False)
            elif self._place.anyone(_outcome.needs_tracing(first, self._options)):
                asked = self._options.notes or self._options.at_step is not None
                self._announce(_ASKED if asked and not _outcome.is_suspicious(first) else _WHY)
                second = self._traced(symptoms=first.symptoms, hidden=True)
        finally:
            self._input.close()
        found = _outcome.conclude(display_name(self._script), first, second, self._options)
        if second is not None and second.code >= 0 and _outcome.failed_anew(first, second):
            _show_end(second.output)
            if self._input.kind == "terminal" and second.error is not None and second.error["type"] == "EOFError":
                found = replace(found, remarks=(*found.remarks, _TYPED))
        return self._place.merged(found)

    def _first(self) -> Ran:
        directory = self._place.directory("first")
        result = self._place.own / f"first.{self._place.rank.rank}.json"
        stdout = 2 if self._options.script_to_stderr else 1
        code = self._run({"stage": 1}, directory, result, Streams(stdout=stdout), hidden=False)
        return replace(_outcome.read_journals(directory, self._place.rank), code=code, told=_read(result))

    def _traced(self, *, symptoms: Sequence[dict[str, Any]], hidden: bool) -> Ran:
        directory = self._place.directory("traced")
        result = self._place.own / f"traced.{self._place.rank.rank}.json"
        what = {
            "stage": 2,
            "steps": self._options.steps,
            "at_step": self._options.at_step,
            "notes": self._options.notes,
            "symptoms": list(symptoms),
            # A rank that ends early would take the others down with it; after N steps all of them end.
            "may_end": self._place.rank.launch is None or self._options.steps is not None,
        }
        if not hidden:
            stdout = 2 if self._options.script_to_stderr else 1
            code = self._run(what, directory, result, Streams(stdout=stdout), hidden=False)
            output = ""
        else:
            with tempfile.TemporaryFile() as file:
                code = self._run(
                    what, directory, result, Streams(stdout=file.fileno(), stderr=file.fileno()), hidden=True
                )
                output = _end_of(file.fileno())
        return Ran(code=code, told=_read(result), not_seen=_outcome.unwatched(directory), output=output)

    def _run(self, what: dict[str, Any], directory: Path, result: Path, streams: Streams, *, hidden: bool) -> int:
        """Run the script to its end and return its exit code."""
        settings = told(self._arguments, Policy(quiet=True, report=False), self._script, self._place.rank, directory)
        settings["explain"] = {**what, "result": str(result), "into": list(self._options.into)}
        environment = self._place.environment(os.environ, again=hidden)
        stdin = self._input.begin(again=hidden)
        try:
            pid = spawn(
                self._command,
                settings,
                environment,
                replace(streams, stdin=stdin),
                own_group=hidden,
                mask=self._waiting.mask,
            )
            self._input.pour()
            code = self._waiting.wait(pid, own_group=hidden, give_up=self._place.given_up)
            if hidden and _read(result).get("how") == "done":
                _end_group(pid)  # the script was cut short: it could not end what it had started
        finally:
            self._input.end()
        self._place.ended(failed=code != 0)
        return code

    def _announce(self, why: str) -> None:
        if self._place.rank.rank == 0:
            how = _NO_TERMINAL if self._input.kind == "terminal" else ""
            print(_AGAIN.format(why=why, how=how), file=sys.stderr)


def _read(result: Path) -> dict[str, Any]:
    try:
        return json.loads(result.read_bytes())
    except (OSError, ValueError):
        return {}


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        return  # nobody is left in it


def _end_of(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, 1 << 16, max(0, size - (1 << 16))).decode("utf-8", "replace")


def _show_end(output: str) -> None:
    print("gradctl: the traced run failed where the first one did not. Its output ended with:", file=sys.stderr)
    for line in output.splitlines()[-_SHOWN_LINES:]:
        print(f"    {line}", file=sys.stderr)
