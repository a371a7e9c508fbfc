"""Run routes under a switch, one forked process each: `python -m off_routes MODE NAME...`; one JSON object a line.

MODE is `none` (no switch: every route must leak), `no_grad` (in the main thread), `off`, or `again`: `off` where it has
been used before, so that the first use, which costs the most, is not repeated in each process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from typing import Any

import torch

from off_routes._registry import ROUTES, Evidence, Route, double, leaf

FILES = ("threads", "modes", "backwards", "functions", "functional", "compiled", "native", "processes", "distributed")
SECONDS = 60.0


def load() -> dict[str, Route]:
    """Import every file of routes; return the registry."""
    for name in FILES:
        importlib.import_module(f"off_routes.{name}")
    return ROUTES


def _switch(mode: str) -> contextlib.AbstractContextManager[object]:
    if mode in ("off", "again"):
        import gradctl

        return gradctl.off()
    return torch.no_grad() if mode == "no_grad" else contextlib.nullcontext()


def _run(route: Route, mode: str) -> dict[str, Any]:
    """Run both halves of one route; the switch is thrown between them and taken back at the end."""
    seen = Evidence()
    body = route.body(seen)
    before = torch.is_grad_enabled()
    next(body)
    with _switch(mode):
        seen.attempt(lambda: next(body, None))
        alive = body.gi_frame is not None
        if alive:
            body.close()
    marks = sorted(seen.marks)
    # Afterwards this thread trains as if nothing had been.
    torch.set_grad_enabled(before)
    w = leaf()
    double(w).backward()
    restored = w.grad is not None and not _listening()
    return {"name": route.name, "marks": marks, "refusals": seen.refusals, "restored": restored}


def _listening() -> list[str]:
    if "gradctl" not in sys.modules:
        return []
    import gradctl

    return ["switch"] if gradctl.is_off() else []


def _fork(route: Route, mode: str) -> dict[str, Any]:
    """Run one route in a forked process of its own, so that it may leave behind what it likes."""
    read, write = os.pipe()
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        os.setpgid(0, 0)
        os.close(read)
        try:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["GRADCTL_TEST_RENDEZVOUS"] = os.path.join(folder, "meet")
                result = _run(route, mode)
        except BaseException:
            result = {"name": route.name, "broken": traceback.format_exc()}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    parts: list[bytes] = []
    deadline = time.monotonic() + SECONDS
    while select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(read, 65536)
        if not part:
            break
        parts.append(part)
        with contextlib.suppress(ValueError):
            json.loads(b"".join(parts))
            break
    os.close(read)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not parts:
        return {"name": route.name, "broken": f"no answer in {SECONDS:.0f} s or killed (status {status})"}
    return json.loads(b"".join(parts))


def main(mode: str, names: list[str]) -> None:
    """Print the outcome of every named route."""
    warnings.simplefilter("ignore")
    routes = load()
    for name in ("torch._dynamo", "torch._functorch.eager_transforms", "torch.optim._functional"):
        importlib.import_module(name)  # once, before the forks: torch imports them when they are first needed
    if mode == "again":
        with _switch(mode):
            pass
    for name in names:
        print(json.dumps(_fork(routes[name], mode)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(load()))
