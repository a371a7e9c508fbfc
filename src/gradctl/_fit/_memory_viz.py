"""The course of a step's storages as a snapshot for pytorch.org/memory_viz: plain lists and numbers, pickled.

The page draws the events of a device in order. Addresses are made up: each storage gets a place of its own, in the
order of births, because the page wants to tell blocks apart and the allocator's own addresses are not known.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any, Final

from gradctl._errors import UsageError
from gradctl._fit._ledger import Entry
from gradctl._fit._memory_watch import Facts

_ALIGNED: Final = 512
_LINE: Final = re.compile(r"(?P<file>.+):(?P<line>\d+) (?P<name>.*)")


def snapshot(facts: Facts, device: str = "cpu") -> dict[str, Any]:
    """Return a snapshot of one device, in the form of `torch.cuda.memory._snapshot`.

    Args:
        facts: what was seen of a step.
        device: as in `cpu` and `cuda:0`.
    """
    seconds = {
        int(change.mark.removeprefix("event ")): change.seconds
        for change in facts.changes
        if change.mark is not None and change.mark.startswith("event ")
    }
    addresses: dict[int, int] = {}
    free = _ALIGNED
    trace: list[dict[str, Any]] = []
    now = 0.0

    def place(entry: Entry, action: str) -> dict[str, Any]:
        nonlocal free
        if entry.number not in addresses:
            addresses[entry.number] = free
            free += -(-max(1, entry.nbytes) // _ALIGNED) * _ALIGNED
        return {
            "action": action,
            "addr": addresses[entry.number],
            "size": entry.nbytes,
            "stream": 0,
            "time_us": round(now * 1e6),
            "frames": _frames(facts, entry),
        }

    alive: dict[int, Entry] = {}
    for entry in facts.ledger.entries:
        if entry.born == 0 and entry.device == device:
            trace.append(place(entry, "alloc"))
            alive[entry.number] = entry
    for number, (change, entry) in enumerate(facts.events, start=1):
        now = seconds.get(number, now)
        if entry.device != device:
            continue
        if change > 0:
            trace.append(place(entry, "alloc"))
            alive[entry.number] = entry
        elif alive.pop(entry.number, None) is not None:
            trace += [place(entry, "free_requested"), place(entry, "free_completed")]
    segments = [_segment(addresses[number], entry, _frames(facts, entry)) for number, entry in alive.items()]
    return {"segments": segments, "device_traces": [trace], "allocator_settings": {}}


def write_pickle(facts: Facts, path: str | os.PathLike[str], device: str = "cpu") -> None:
    """Write the snapshot of one device for pytorch.org/memory_viz.

    Args:
        facts: what was seen of a step.
        path: the file; one that is there is not overwritten.
        device: as in `cpu` and `cuda:0`.

    Raises:
        UsageError: it exists, or cannot be written.
    """
    try:
        with Path(path).open("xb") as file:
            pickle.dump(snapshot(facts, device), file)
    except OSError as error:
        raise UsageError(f"cannot write {os.fspath(path)}", why=error.strerror or str(error)) from error


def _segment(address: int, entry: Entry, frames: list[dict[str, Any]]) -> dict[str, Any]:
    size = -(-max(1, entry.nbytes) // _ALIGNED) * _ALIGNED
    block = {
        "address": address,
        "size": size,
        "requested_size": entry.nbytes,
        "state": "active_allocated",
        "frames": frames,
    }
    return {
        "device": 0,
        "address": address,
        "total_size": size,
        "allocated_size": size,
        "active_size": size,
        "requested_size": entry.nbytes,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": frames,
        "blocks": [block],
    }


def _frames(facts: Facts, entry: Entry) -> list[dict[str, Any]]:
    """Return what stands for the stack: the operation and the module, then the line."""
    where: Any = entry.where
    name = facts.weights.get(entry.number) or facts.gradients.get(entry.number)
    kind = (
        "weight" if entry.number in facts.weights
        else "gradient" if entry.number in facts.gradients
        else "optimizer state" if entry.number in facts.states
        else "input" if entry.number in facts.inputs
        else where.phase if where is not None
        else "before"
    )  # fmt: skip
    module = name or (where.module if where is not None else None) or ""
    operation = str(entry.operation) if entry.operation is not None else ""
    frames = [{"filename": module, "line": 0, "name": " ".join(filter(None, [kind, operation]))}]
    found = _LINE.fullmatch(where.line) if where is not None and where.line else None
    if found is not None:
        frames.append({"filename": found["file"], "line": int(found["line"]), "name": found["name"]})
    return frames
