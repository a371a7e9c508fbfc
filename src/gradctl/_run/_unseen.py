"""Notices processes that a program starts in ways that gradctl cannot follow, so that the report can say so."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gradctl import _taps
from gradctl._run._injection import SITE, VARIABLE
from gradctl._run._process import ProcessJournal

_ELSEWHERE = {
    **dict.fromkeys(("docker", "podman", "singularity", "apptainer", "nerdctl", "enroot"), "in a container"),
    **dict.fromkeys(("ssh", "kubectl", "srun", "mpirun", "mpiexec"), "perhaps on another host"),
}
_KEPT = 20


def listen(journal: ProcessJournal) -> _taps.Handle:
    """Note in the journal's `not_seen` each process started through `subprocess` that will not be recorded."""

    def around(inner: Any) -> Any:
        def start(popen: Any, args: Any, *rest: Any, **keywords: Any) -> Any:
            environment = keywords.get("env", rest[9] if len(rest) > 9 else None)
            if len(journal.not_seen) < _KEPT:
                try:
                    why = reason(args, environment)
                except (TypeError, ValueError, AttributeError):
                    why = None  # it is about to fail in Popen itself
                if why is not None:
                    journal.not_seen[why] = None
            return inner(popen, args, *rest, **keywords)

        return start

    return _taps.popen.subscribe(around, order="measure")


def reason(args: Any, environment: Mapping[Any, Any] | None) -> tuple[str, str] | None:
    """Say what a command starts and why that will not be recorded; None if it will be, or is no Python."""
    words = _words(args)
    if not words:
        return None
    program = os.path.basename(words[0])
    if program in _ELSEWHERE:
        return f"what `{program}` starts", f"it runs {_ELSEWHERE[program]}"
    if not program.startswith(("python", "pypy")):
        return None
    for word in words[1:]:
        if not word.startswith("-") or word in ("-", "--") or word[1] in "cm":
            break
        lost = next((letter for letter in word[1:] if letter in "EIS"), None) if word[1] not in "-WX" else None
        if lost is not None:
            return "a Python child", f"it was started with -{lost}"
    told = os.environ if environment is None else {os.fsdecode(key): value for key, value in environment.items()}
    if VARIABLE not in told or SITE not in os.fsdecode(told.get("PYTHONPATH", "")).split(os.pathsep):
        return "a Python child", f"it was started without the {VARIABLE} and PYTHONPATH of this program"
    return None


def _words(args: Any) -> Sequence[str]:
    if isinstance(args, str | bytes):
        text = os.fsdecode(args)
        return shlex.split(text) if len(text) < 4096 else []
    return [os.fsdecode(args)] if isinstance(args, os.PathLike) else [os.fsdecode(word) for word in args]
