"""Runs every program of a folder as a script, each in a fork of one process that has loaded torch already.

Usage: `python cause_examples.py FOLDER`. Beside each `NAME.py` it leaves `NAME.out`, `NAME.err`, `NAME.rc` (exit code)
and `NAME.sec` (seconds, without the import of torch).
"""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
from pathlib import Path

# Loaded once, before the forks: what takes seconds in a program of thirty lines is this import.
import torch.distributed
import torch.utils.checkpoint


def run(script: Path) -> int:
    """Run `script` as `__main__` in a child and return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for stream, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(script.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = [str(script)]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm() -> None:
    """Let torch import what the first step of an optimizer imports; no backward, so that no engine exists at the fork."""
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.Adam([weight])
    optimizer.step()
    optimizer.zero_grad()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warm()
    for script in sorted(folder.glob("*.py")):
        started = time.perf_counter()
        code = run(script)
        script.with_suffix(".sec").write_text(f"{time.perf_counter() - started:.3f}")
        script.with_suffix(".rc").write_text(str(code))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
