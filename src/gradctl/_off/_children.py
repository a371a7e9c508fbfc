"""Processes that are started while gradients are off start with gradients off.

A forked child has the parent's memory, and with it the switch. A spawned one, or one from a fork server, unpickles its
`Process` object before it runs its target: a token in that object switches off there. A `subprocess` gets
`GRADCTL_OFF=1` in an environment of its own, with the folder of a small `sitecustomize` in front of its PYTHONPATH. A
child that never imports torch is not made to. The parent's own environment is never written: `getenv` in other threads
would race with it.

Not reached: a process that was running already, one started by `os.posix_spawn`, `os.system` or C, and one that ignores
PYTHONPATH (`python -I`, `-E`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradctl import _taps
from gradctl._off import _state

VARIABLE = "GRADCTL_OFF"
_SITE = Path(__file__).resolve().parent / "_inherit"
_TOKEN = "_gradctl_off"


class Token:
    """Stands in a pickled `Process`; to unpickle it is to switch off."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return (_switch_off if _state.is_shut else _do_nothing), ()


def subscribe() -> list[_taps.Handle]:
    """Follow processes that are started; changes nothing about them while gradients are on."""
    return [
        _taps.process_start.subscribe(_start, order="veto"),
        _taps.popen.subscribe(_popen, order="veto"),
    ]


def environment(inherited: Mapping[Any, Any]) -> dict[str, str]:
    """Return the environment of a child that starts with gradients off; names and values may be bytes."""
    inherited = {os.fsdecode(name): os.fsdecode(value) for name, value in inherited.items()}
    before = inherited.get("PYTHONPATH")
    site = str(_SITE)
    if before is None:
        path = site
    else:
        path = before if site in before.split(os.pathsep) else os.pathsep.join((site, before))
    return {**inherited, VARIABLE: "1", "PYTHONPATH": path}


def _start(inner: Callable[..., Any]) -> Callable[..., Any]:
    def start(process: Any) -> Any:
        if not _state.is_shut:
            return inner(process)
        # Last in the object, so that what it carries is there before: tensors, and with them torch.
        setattr(process, _TOKEN, Token())
        try:
            return inner(process)
        finally:
            vars(process).pop(_TOKEN, None)

    return start


def _popen(inner: Callable[..., Any]) -> Callable[..., Any]:
    import inspect
    import subprocess

    # `env` may be given by position; the signature is that of the original, whoever wraps it inside of us.
    names = list(inspect.signature(subprocess.Popen.__init__).parameters)
    position = names.index("env")

    def __init__(*args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if not _state.is_shut:
            return inner(*args, **kwargs)
        given = args[position] if len(args) > position else kwargs.get("env")
        chosen = environment(os.environ if given is None else given)
        if len(args) > position:
            args = (*args[:position], chosen, *args[position + 1 :])
        else:
            kwargs["env"] = chosen
        return inner(*args, **kwargs)

    return __init__


def _switch_off() -> None:
    from gradctl._off._after_torch import switch_off_after_torch

    switch_off_after_torch()


def _do_nothing() -> None:
    return None
