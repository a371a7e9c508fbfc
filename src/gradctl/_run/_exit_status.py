"""With which exit code, and by which exception, the interpreter is going down."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
import traceback
from typing import Any

_MESSAGE_LIMIT = 500


def code(status: tuple[Any, ...] | None) -> int | None:
    """Return the exit code of a process in its exit handlers, or None where the interpreter does not let it be known.

    Args:
        status: what `sys.exit` was given if that is what ends the process, as a tuple of one; an empty one if it was
            called and it is not known what became of it; None if it was not called.
    """
    if sys.flags.inspect or sys.flags.interactive:
        return None
    error = last_error()
    if error is not None:
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    if status == ():
        return None
    if status is not None:
        value = status[0]
        return 0 if value is None else value & 0xFF if isinstance(value, int) else 1
    # `raise SystemExit(3)` leaves no trace: where the program holds one, falling off its end is not certain.
    return None if _main_raises_system_exit() else 0


def keep_interrupt() -> None:
    """Let a program that Ctrl-C has ended die of SIGINT, as it was about to do before we ran code in its exit handlers.

    The interpreter remembers an unhandled KeyboardInterrupt in a flag that every `exec` of a text clears, those in the
    standard library's dataclasses among them, and sets it again when such a text ends with KeyboardInterrupt.
    """
    error = last_error()
    if isinstance(error, KeyboardInterrupt) and error.__traceback__ is not None:
        try:
            exec("raise KeyboardInterrupt")
        except KeyboardInterrupt:
            return


def exception() -> dict[str, Any] | None:
    """Describe the exception that ends the process; None if none does."""
    error = last_error()
    return None if error is None else describe(error)


def describe(error: BaseException) -> dict[str, Any]:
    """Return type, message, file and line of an exception, as the journal keeps it; the line is the program's own."""
    kind = type(error)
    try:
        message = str(error)[:_MESSAGE_LIMIT]
    except Exception as fault:  # the script's own __str__
        message = f"(its message cannot be read: {type(fault).__name__})"
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    found: dict[str, Any] = {"type": name, "message": message, "file": None, "line": None}
    if isinstance(error, SyntaxError) and error.filename:
        return found | {"file": error.filename, "line": error.lineno}
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [place for place in frames if not _is_library(place[0])]
    for file, line in (own or frames)[-1:]:
        found |= {"file": os.path.abspath(file) if not file.startswith("<") else file, "line": line}
    return found


def last_error() -> BaseException | None:
    """Return the exception that the interpreter has printed last, which ends the process."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return error if isinstance(error, BaseException) else None


def _is_library(file: str) -> bool:
    if file.startswith("<frozen"):
        return True
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*getattr(site, "getsitepackages", list)(), os.path.dirname(os.path.dirname(__file__))]
    return any(file.startswith(folder + os.sep) for folder in folders if folder)


def _main_raises_system_exit() -> bool:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if not isinstance(file, str):
        return "SystemExit" in " ".join(sys.orig_argv)
    try:
        with open(file, "rb") as source:
            return b"SystemExit" in source.read(1 << 20)
    except OSError:
        return True
