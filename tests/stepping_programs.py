"""Runs programs under the recorder, each in a fork of one process that has loaded torch already.

Usage: `python stepping_programs.py RESULTS FOLDER...`. For each `NAME.py` it leaves a run directory `RESULTS/NAME`, as
`gradctl run` would have, and in it `rc`, the exit code of the program.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import torch

from gradctl import _journal
from gradctl._record import Recorder


def run(script: Path, results: Path) -> int:
    """Run one program in a fork and return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, error = 1, None
    folder = results / script.stem
    folder.mkdir()
    os.chdir(folder)
    sys.path.insert(0, str(script.parent))
    warnings.simplefilter("ignore")
    writer = _journal.JournalWriter(folder / "journal.rank0.jsonl")
    header = {"schema": _journal.SCHEMA, "argv": [str(script)], "script": script.name, "cwd": str(folder)}
    writer.write("run", **header, pid=os.getpid(), rank=0, world_size=1)
    recorder = Recorder(writer)
    try:
        recorder.install()
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except BaseException as caught:
        error = {"type": type(caught).__name__, "message": str(caught), "file": str(script), "line": 1}
        (folder / "error").write_text(traceback.format_exc())
    finally:
        recorder.finish("exit", code=code, exc=error)
        writer.close()
        os._exit(code)


def warm() -> None:
    """Let torch import what a first step imports; without a backward, so that no engine exists at the fork."""
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.Adam([weight])
    optimizer.step()
    optimizer.zero_grad()
    torch.utils.data.DataLoader([1])


def main(results: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    warm()
    for folder in folders:
        for script in sorted(folder.glob("*.py")):
            code = run(script, results)
            (results / script.stem / "rc").write_text(str(code))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
