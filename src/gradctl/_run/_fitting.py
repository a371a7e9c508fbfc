"""`gradctl fit`: run the script until its model is fitted, and say what was found.

The other side, inside the script, is `_traced.py`; what fits is `gradctl._fit`.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradctl._errors import GradctlError, UsageError
from gradctl._policy import Policy, parse_size
from gradctl._run import _launcher
from gradctl._run._module import check_module
from gradctl._run._stage import Interrupted, Streams, Waiting, spawn
from gradctl._run._start import UNSEEN, check_script, display_name, hiding, module_of, split, told
from gradctl._run._traced import FIT

_NEEDED = 4


@dataclass(frozen=True, slots=True)
class Fitted:
    """What `gradctl fit` has found.

    Args:
        exit_code: 0 fitted, 1 no plan stays within the budget, 2 the script cannot be fitted as it is, 3 a failure of
            ours, 4 no verdict.
        text: what to tell.
        plan: the plan as `gradctl.plan/1`; None if there is none.
    """

    exit_code: int
    text: str
    plan: dict[str, Any] | None = None


def fit(command: Sequence[str], script: str, memory: str, *, script_to_stderr: bool = False) -> Fitted:
    """Run a script until its model is fitted to a byte budget.

    Args:
        command: what the interpreter gets: its own flags, then SCRIPT, `-m MODULE` or `-c CODE`, then their arguments.
        script: what stands for the script in `command`.
        memory: the budget.
        script_to_stderr: the script writes to stderr, what it would write to stdout.

    Raises:
        GradctlError: this system cannot start a process in this way.
        UsageError: the budget is none, there is no such script, or it cannot be fitted in this way.
    """
    if os.name != "posix":
        raise GradctlError(
            "gradctl fit works on Linux and macOS only",
            why="a script cannot be started in the same way here",
            fix="call gradctl.fit(model, step, memory=...) in the script",
        )
    if parse_size(memory) <= 0:
        raise UsageError(f"--memory {memory} is no budget", what="a budget is above zero", fix="--memory 8GiB")
    flags, kind = split(command, script)
    if kind == "file":
        check_script(script, verb="fit")
    module, safe_path = module_of(command, script)
    if module is not None:
        check_module(module, verb="fit", safe_path=safe_path)
    lost = hiding(flags)
    if lost is not None:
        raise UsageError(f"nothing can be fitted under `python -{lost}`", why=UNSEEN[lost], fix=f"leave -{lost} out")
    rank = _launcher.find(os.environ)
    if rank.world_size > 1:
        raise UsageError(
            f"gradctl fit was started in {rank.world_size} processes",
            why="each would find a plan of its own, and end while the others wait for it",
            fix="fit one process with the batch of one rank, then: torchrun ... -m gradctl run --plan plan.json ...",
        )
    waiting = Waiting()
    try:
        with waiting.held(), tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
            result = Path(folder) / "result.json"
            settings = told(command[len(flags) :], Policy(quiet=True, report=False), script, rank, Path(folder))
            settings["explain"] = {"stage": FIT, "memory": memory, "result": str(result)}
            streams = Streams(stdout=2 if script_to_stderr else 1)
            pid = spawn(command, settings, dict(os.environ), streams, own_group=False, mask=waiting.mask)
            code = waiting.wait(pid, own_group=False, give_up=lambda: False)
            return conclude(display_name(script), code, _read(result))
    except Interrupted as interrupted:
        signal.signal(interrupted.signum, signal.SIG_DFL)
        os.kill(os.getpid(), interrupted.signum)
        raise AssertionError("a process outlived its own signal") from None


def conclude(script: str, code: int, found: dict[str, Any]) -> Fitted:
    """Say what the result of a run means.

    Args:
        script: its name.
        code: its exit code.
        found: the result that it left; empty if it left none.
    """
    if found.get("faults"):
        return Fitted(3, f"gradctl could not fit {script}: {found['faults'][0]}")
    if "refused" in found:
        smallest = found["refused"]["smallest"]
        return Fitted(2 if smallest is None else 1, found["refused"]["text"])
    if "plan" in found:
        lines = [f"{found['model']} in {script}", found["text"], *(f"  {remark}" for remark in found["remarks"])]
        return Fitted(0, "\n".join(lines), found["plan"])
    error = found.get("error")
    if error is not None:
        where = f" at {error['file']}:{error['line']}" if error["file"] else ""
        return Fitted(
            4, f"no verdict: {script} failed before it was fitted: {error['type']}: {error['message']}{where}"
        )
    if code != 0:
        return Fitted(4, f"no verdict: {script} ended with exit code {code} before it was fitted")
    if not found.get("torch"):
        return Fitted(4, f"no verdict: {script} never imported torch")
    steps = found.get("steps", 0)
    return Fitted(
        4,
        f"no verdict: {script} made {steps} optimizer step{'' if steps == 1 else 's'}, and a fit needs {_NEEDED} "
        "or more: two to settle, one to profile, one to measure",
    )


def _read(result: Path) -> dict[str, Any]:
    try:
        return json.loads(result.read_bytes())
    except (OSError, ValueError):
        return {}
