"""Runs scripts under a sentinel, each in a fork of one process that has loaded torch already.

Usage: `python sentinel_runs.py LIST`, a file with one script a line. Prints a JSON object: what the sentinel said about
each, by path; None for one that did not end by itself.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

# Loaded once, before the forks: what takes seconds in a program of thirty lines is this import.
import torch.distributed

from cause_examples import warm
from gradctl._explain import Sentinel


def run(script: Path, answer: int) -> None:
    """Run `script` as `__main__` under a sentinel, write what it said, and end this process."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        warnings.simplefilter("ignore")
        sys.argv = [str(script)]
        sys.path.insert(0, str(script.parent))
        os.chdir(tempfile.mkdtemp())
        sentinel = Sentinel()
        sentinel.install()
        error: BaseException | None = None
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit:
            error = None
        except BaseException as raised:
            error = raised
        os.write(answer, json.dumps(sentinel.finish(error)).encode())
    finally:
        os._exit(0)


def main(scripts: list[Path]) -> None:
    torch.set_num_threads(1)
    warm()
    found: dict[str, object] = {}
    for script in scripts:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            run(script, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            text = answer.read()
        os.waitpid(child, 0)
        found[str(script)] = json.loads(text) if text else None
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main([Path(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()])
