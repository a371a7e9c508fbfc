"""Traces every script of a list as `gradctl explain --full` would, each in a fork of one process that has loaded torch.

Usage: `python diagnose_all.py OUT SCRIPT...`. Writes `OUT`: for each script its findings, faults and steps, as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

# Loaded once, before the forks: what takes seconds in a program of thirty lines is this import.
import torch
import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401

from gradctl._explain import Tracing
from gradctl._explain.rules import every_rule


def diagnose(script: Path, out: Path) -> None:
    """Run `script` traced and write what was found; ends the process."""
    tracing = Tracing(script=str(script))
    tracing.start()
    error = _run(script)
    found = tracing.findings(error)
    tracing.stop()
    out.write_text(
        json.dumps({"findings": [f.to_json() for f in found], "faults": tracing.faults, "steps": tracing.steps})
    )


def _run(script: Path) -> BaseException | None:
    sys.argv = [str(script)]
    sys.path.insert(0, str(script.parent))
    os.chdir(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit:
        return None
    except BaseException as error:
        return error
    return None


def in_fork(script: Path, out: Path) -> int:
    """Run `diagnose` in a forked child; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        diagnose(script, out)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(out: Path, scripts: list[Path]) -> None:
    torch.set_num_threads(1)
    every_rule()
    gc.collect()
    gc.freeze()  # what was loaded before the forks is no part of the programs, and is not looked through
    results: dict[str, object] = {}
    for number, script in enumerate(scripts):
        file = out.with_name(f"{out.stem}-{number}.json")
        code = in_fork(script, file)
        results[str(script)] = (
            json.loads(file.read_text()) if code == 0 else {"failed": file.with_suffix(".log").read_text()[-2000:]}
        )
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(script) for script in sys.argv[2:]])
