"""Runs every program of some folders as a script, each in a fork of one process that has loaded torch already.

Usage: `python cause_examples.py FOLDER...`. Beside each `NAME.py` it leaves `NAME.out`, `NAME.err`, `NAME.rc` (the
exit code) and `NAME.steps` (how many steps its optimizers took).
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

# Loaded once, before the forks: what takes seconds in a program of thirty lines is this import.
import torch.distributed
from torch.optim.optimizer import register_optimizer_step_post_hook


def run(script: Path) -> int:
    """Run `script` as `__main__` in a child and return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    steps: list[int] = []
    try:
        for stream, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(script.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = [str(script)]
        register_optimizer_step_post_hook(lambda *_: steps.append(1))
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        script.with_suffix(".steps").write_text(str(len(steps)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm() -> None:
    """Let torch import what a first step imports; without a backward, so that no engine exists at the fork."""
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.Adam([weight])
    optimizer.step()
    optimizer.zero_grad()


def main(folders: list[Path]) -> None:
    torch.set_num_threads(1)
    warm()
    for folder in folders:
        for script in sorted(folder.glob("*.py")):
            script.with_suffix(".rc").write_text(str(run(script)))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
