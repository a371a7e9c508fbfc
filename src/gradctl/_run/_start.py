"""Become the script: check what can be checked, make the run directory, then `exec` the real interpreter.

The interpreter gets the user's own words, one folder more on PYTHONPATH and the variable GRADCTL_RUN; process id,
arguments, exit code and signals are the script's own, because there is no other process.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from gradctl._errors import GradctlError, UsageError
from gradctl._policy import Policy
from gradctl._run import _directory, _launcher
from gradctl._run._injection import inject, withdraw
from gradctl._run._redact import redact

UNSEEN = {"E": "PYTHONPATH is ignored", "I": "PYTHONPATH is ignored", "S": "`site` is left out"}
_WITH_VALUE = "WX"
PLAN_SCHEMA = "gradctl.plan/1"


def start(command: Sequence[str], policy: Policy, script: str, *, memory: Mapping[str, Any] | None = None) -> NoReturn:
    """Replace this process by `python COMMAND`, with gradctl waiting in it for torch.

    Args:
        command: what the interpreter gets: its own flags, then SCRIPT, `-m MODULE` or `-c CODE`, then their arguments.
        policy: how the run treats gradients and what it leaves behind.
        script: what stands for the script in `command`: its path, the module, `-` or `-c`.
        memory: which step's memory is measured, and where the report goes; see `_metered`.

    Raises:
        GradctlError: this system cannot replace a process.
        UsageError: there is no such script, or it is not a Python program.
        RunDirectoryError: the run directory holds something already, or cannot be made.
    """
    if os.name != "posix":
        raise GradctlError(
            "gradctl run works on Linux and macOS only",
            why="a program cannot take the place of another here",
            fix="call gradctl.record() in the script",
        )
    flags, kind = split(command, script)
    if kind == "file":
        check_script(script, verb="run" if memory is None else "memory")
    if policy.plan is not None:
        check_plan(policy.plan)
    environment = dict(os.environ)
    lost = hiding(flags)
    if lost is not None:
        if memory is not None:
            raise UsageError(
                f"nothing can be measured under `python -{lost}`", why=UNSEEN[lost], fix=f"leave -{lost} out"
            )
        if policy.grad == "off":
            raise UsageError(
                f"gradients cannot be kept off under `python -{lost}`",
                why=UNSEEN[lost],
                fix=f"leave -{lost} out, or switch off in the script: gradctl.off().start()",
            )
        withdraw(environment)
        if not policy.quiet:
            print(f"gradctl: nothing can be recorded under `python -{lost}`: {UNSEEN[lost]}", file=sys.stderr)
    else:
        rank = _launcher.find(environment)
        directory = _directory.make(policy, display_name(script), rank)
        settings = told(command[len(flags) :], policy, script, rank, directory)
        inject(environment, settings if memory is None else {**settings, "memory": dict(memory)})
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # pyright: ignore[reportUnnecessaryComparison]  (closed by whoever started us)
            stream.flush()
    os.execve(sys.executable, [sys.executable, *command], environment)


def check_plan(path: Path) -> None:
    """Check that a file is a plan, as far as that needs no torch.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as fault:
        raise UsageError(
            f"{path} cannot be read as a plan", what=str(fault), fix="pass what gradctl fit -o wrote"
        ) from fault
    schema: object = cast("dict[str, object]", data).get("schema") if isinstance(data, dict) else None
    if schema != PLAN_SCHEMA:
        raise UsageError(
            f"{path} is no plan",
            what=f"its schema is {schema!r}, not {PLAN_SCHEMA!r}",
            fix="pass what gradctl fit -o wrote",
        )


def told(
    arguments: Sequence[str], policy: Policy, script: str, rank: _launcher.Rank, directory: Path
) -> dict[str, Any]:
    """Return what a script is told about its run.

    Args:
        arguments: SCRIPT, `-m MODULE` or `-c CODE`, then their arguments.
        policy: how the run treats gradients.
        script: what stands for the script.
        rank: which process of a launched job this is.
        directory: the run directory.
    """
    return {
        "script": display_name(script),
        "argv": _shortened(redact(arguments)),
        "rank": rank.rank,
        "draws": rank.draws,
        "grad": policy.grad,
        "on_nonfinite": policy.on_nonfinite,
        "watch_steps": policy.watch_steps,
        "plan": None if policy.plan is None else os.path.abspath(policy.plan),
        "lines": policy.lines,
        "report": policy.report,
        "quiet": policy.quiet,
        "budget": policy.budget,
        "out": str(directory),
    }


def _shortened(arguments: Sequence[str]) -> list[str]:
    """Leave out what would not fit: one variable of an environment holds 128 KiB at most."""
    kept: list[str] = []
    room = 16384
    for argument in arguments:
        room -= len(argument.encode("utf-8", "surrogateescape")) + 8
        if room < 0:
            return [*kept, f"... ({len(arguments) - len(kept)} more)"]
        kept.append(argument)
    return kept


def display_name(script: str) -> str:
    """Return what a run of that script is called: the module, or the name of the file."""
    return {"-": "stdin", "-c": "command"}.get(script) or Path(os.path.abspath(script)).name


def hiding(flags: Sequence[str]) -> str | None:
    """Return the interpreter's option among `flags` under which gradctl is not found in the script; see `UNSEEN`."""
    return next((letter for flag in flags for letter in _letters(flag) if letter in UNSEEN), None)


def split(command: Sequence[str], script: str) -> tuple[list[str], str]:
    """Return the interpreter's flags in front of the script, and what the script is: "file" or "other"."""
    position = 0
    while position < len(command):
        word = command[position]
        if word in ("-", "--") or not word.startswith("-"):
            break
        if word.startswith("--"):
            position += 2 if word == "--check-hash-based-pycs" else 1
            continue
        letters = _letters(word)
        if letters[-1:] in ("c", "m"):
            return list(command[:position]), "other"
        takes_next = letters[-1:] != "" and letters[-1] in _WITH_VALUE and word.endswith(letters)
        position += 2 if takes_next else 1
    return list(command[:position]), "other" if script == "-" else "file"


def module_of(command: Sequence[str], script: str) -> tuple[str | None, bool]:
    """Return the module that `-m` names, None for anything else, and whether `-P` stands before it.

    Args:
        command: what the interpreter gets.
        script: what stands for the script in `command`.
    """
    flags, kind = split(command, script)
    letters = "".join(_letters(word) for word in command[: len(flags) + 1])
    return (script if kind == "other" and letters.endswith("m") else None), "P" in letters


def _letters(word: str) -> str:
    """The one-letter options of a word, up to the first that takes a value (that one included)."""
    if not word.startswith("-") or word.startswith("--"):
        return ""
    for place, letter in enumerate(word[1:], start=1):
        if letter in "cm" + _WITH_VALUE:
            return word[1 : place + 1]
    return word[1:]


def check_script(script: str, *, verb: str = "run") -> None:
    """Check that the interpreter can run that path; what is inside a Python file is the interpreter's own business.

    Args:
        script: the path.
        verb: who asks.

    Raises:
        UsageError: it does not exist, cannot be read, or is something else than a Python program.
    """
    path = Path(script)
    if not path.exists():
        raise UsageError(f"there is no script {script}", fix=_what_was_meant(script, verb))
    if path.is_dir():
        if not (path / "__main__.py").is_file():
            raise UsageError(
                f"{script} is a directory",
                why="only a directory with a __main__.py can be run",
                fix=f"name the script in it, or run a package as `gradctl {verb} -m PACKAGE`",
            )
        return
    if not path.is_file():
        return  # a pipe: looking into it would take its bytes away
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UsageError(f"{script} cannot be read", why=error.strerror or str(error)) from error
    other = _other_language(script, head)
    if other is not None:
        raise UsageError(
            f"{script} is not a Python script",
            why=other,
            fix="name the Python script that trains; in a launcher script write "
            f"`gradctl {verb} train.py` where it says `python train.py`",
        )


def _what_was_meant(script: str, verb: str) -> str:
    if script == "torchrun" or os.path.basename(script) in ("torchrun", "accelerate", "deepspeed", "mpirun", "srun"):
        return f"start it the other way round: {os.path.basename(script)} ... -m gradctl {verb} train.py"
    if script in ("python", "python3"):
        return f"leave the word out: gradctl {verb} train.py"
    folder, name = os.path.split(script)
    try:
        names = os.listdir(folder or ".")
    except OSError:
        names = []
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {os.path.join(folder, near[0])}?"
    if shutil.which(script):
        return f"{script} is a program, not a script: name the Python file that it runs"
    return f"name a file that exists; the working directory is {os.getcwd()}"


def _other_language(script: str, head: bytes) -> str | None:
    """Say why a file is not Python source, bytecode or an archive of it; None if it may be."""
    first = head.split(b"\n", 1)[0]
    if first.startswith(b"#!") and b"python" not in first and b"pypy" not in first:
        interpreter = first[2:].decode("utf-8", "replace").strip()
        return f"its first line asks for {interpreter}"
    if head.startswith(b"\x7fELF"):
        return "it is a compiled program"
    if b"\0" in head and not script.endswith(".pyc"):
        import zipfile

        if not zipfile.is_zipfile(script):
            return "it holds binary data"
    return None
