"""Programs of a few lines, traced in this process and emptied when they end."""

from __future__ import annotations

import sys
import types
from pathlib import Path

from gradctl._explain._tracing import Tracing
from gradctl._results import Finding


def findings(folder: Path, text: str, *, notes: bool = False, may_raise: bool = False) -> list[Finding]:
    """Return what is found in a program, run as `__main__` from `program.py`.

    Its variables are emptied afterwards: the error of a custom function, for example, keeps the globals of a program
    alive through C++, where the collector does not look, and with them its optimizers, which later tests would find.

    Args:
        folder: where the script is put.
        text: the program.
        notes: show harmless breaks too.
        may_raise: take the exception that ends the program for a symptom; otherwise it is a failure of the test.
    """
    script = folder / "program.py"
    script.write_text(text)
    program = types.ModuleType("__main__")
    program.__file__ = str(script)
    tracing = Tracing(script=str(script), notes=notes)
    before, sys.modules["__main__"] = sys.modules["__main__"], program
    error: Exception | None = None
    tracing.start()
    try:
        try:
            exec(compile(text, str(script), "exec"), program.__dict__)
        except Exception as raised:
            if not may_raise:
                raise
            error = raised
        found = tracing.findings(error)
    finally:
        tracing.stop()
        sys.modules["__main__"] = before
        program.__dict__.clear()
    assert tracing.faults == []
    return found


def line_of(text: str, mark: str = "cause") -> int:
    """Return the line that ends with that mark."""
    return 1 + next(number for number, line in enumerate(text.splitlines()) if line.endswith(f"# {mark}"))
