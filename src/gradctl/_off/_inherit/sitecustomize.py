"""Switches gradients off in a Python child of a process in which they are off, once that child imports torch.

The interpreter imports this file itself, because its folder is on PYTHONPATH. It takes the folder off `sys.path` and
gives way to the `sitecustomize` that it hides.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _start():
    if _HERE in sys.path:
        sys.path.remove(_HERE)
    sys.path_importer_cache.pop(_HERE, None)
    if os.environ.get("GRADCTL_OFF") != "1":
        return
    parent = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))
    sys.path.append(parent)  # for an interpreter that has no gradctl of its own
    try:
        from gradctl._off._after_torch import switch_off_after_torch
    finally:
        sys.path.remove(parent)
    switch_off_after_torch()


try:
    _start()
except Exception as fault:
    # The child goes on as plain Python would, but nobody may believe that its gradients are off.
    sys.stderr.write(f"gradctl: gradients are NOT off in process {os.getpid()}: {fault}\n")

sys.modules.pop("sitecustomize", None)
import sitecustomize  # noqa: E402, F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
