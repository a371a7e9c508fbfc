"""Starts programs with plain Python and under `gradctl run`, in the same way, to be compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "semantics"
FAKE_TORCH = str(SCRIPTS / "fake_torch")
"""On PYTHONPATH, a `torch` that imports at once: enough where only the start of a script matters."""
GRADCTL = (sys.executable, "-m", "gradctl", "run")


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit code (negative for a signal) and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def own_stderr(self) -> str:
        """What the program wrote to stderr, without the lines that gradctl adds."""
        return "".join(line for line in self.stderr.splitlines(keepends=True) if not line.startswith("gradctl: "))


def environment(**changes: str | None) -> dict[str, str]:
    """The environment of this process without launcher variables and PYTHONPATH, with those changes."""
    found = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    found["OMP_NUM_THREADS"] = "1"
    for key, value in changes.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    return found


def launch(
    command: Sequence[str | os.PathLike[str]],
    cwd: Path,
    *,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    **options: Any,
) -> Outcome:
    """Run a command to its end, with `stdin` as its input."""
    done = subprocess.run(
        [os.fspath(word) for word in command],
        cwd=cwd,
        env=dict(env) if env is not None else environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        **options,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def plain(*command: str | os.PathLike[str], cwd: Path, **options: Any) -> Outcome:
    """Run `python COMMAND`."""
    return launch([sys.executable, *command], cwd, **options)


def recorded(*command: str | os.PathLike[str], cwd: Path, **options: Any) -> Outcome:
    """Run `gradctl run COMMAND`."""
    return launch([*GRADCTL, *command], cwd, **options)


def run_directory(cwd: Path) -> Path:
    """The only run directory that was made under `cwd`."""
    (found,) = (cwd / "gradctl-runs").iterdir()
    return found


def journal_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a journal, each of which must parse."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
