"""Making dropped contents again: the noted operations, called once more on the same storages, below autograd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from gradctl import _torch_private as private
from gradctl._errors import StaleSource
from gradctl._recompute._notes import Operation, Reference, Version
from gradctl._recompute._operations import drawing_from
from gradctl._recompute._storage import copy_of, fingerprint, unpack
from gradctl._recompute._switches import switched, switches
from gradctl._recompute._tape import Saved, Tape

_no_modes = private.get("no_dispatch_modes")
_below_autograd = private.get("below_autograd")
_ask = private.find("graph_is_kept")


def value(saved: Saved) -> Tensor:
    """Return a saved tensor, making every dropped content of its region again if it is the first."""
    tape, version = saved.tape, saved.version
    with tape.lock:
        if version.packed is not None:
            with tape.quiet(), torch.no_grad():
                return saved.geometry.view(unpack(version.packed))
        kept = _graph_is_kept()
        if not version.at_hand and version not in tape.values:
            _make(tape, version, kept=kept)
        with _no_modes(), torch.no_grad():
            if version.at_hand:
                made = saved.geometry.view(_source(version, version.operation))
            else:
                made = _handed_out(tape, saved)
            if saved.fingerprint is not None and fingerprint(made, tape.verify) != saved.fingerprint:
                raise _differs(saved)
        if kept:
            waiting = tape.pending.get(version)
            if waiting is not None:
                waiting.add(id(saved))
                if len(waiting) >= version.handles:
                    tape.let_go(version)
                    del tape.pending[version]
        return made


def _handed_out(tape: Tape, saved: Saved) -> Tensor:
    """Return a saved tensor on a content made again; all of them share a version counter, as they would have."""
    version, where = saved.version, saved.geometry
    found = tape.bases.get(version)
    if found is None:
        base = torch.empty(0, dtype=where.dtype, device=tape.values[version].device).set_(tape.values[version])
        tape.bases[version] = base, base._version
    else:
        base, expected = found
        if base._version != expected:
            raise changed(base, expected, version.operation)
    if base.dtype != where.dtype:
        return where.view(tape.values[version])
    made = base.as_strided(where.size, where.stride, where.offset)
    return where.marked(made)


def _graph_is_kept() -> bool:
    """Whether the graph may be walked again after the backward that is running now."""
    if _ask is None:
        return True
    try:
        return bool(_ask())
    except RuntimeError:
        return True  # no backward is running: somebody looks at a node


def needed(targets: Iterable[Version]) -> set[Operation]:
    """Return the operations that must be called again to make these contents."""
    found: set[Operation] = set()
    queue = list(targets)
    while queue:
        version = queue.pop()
        if version.at_hand or version.operation is None or version.operation in found:
            continue
        found.add(version.operation)
        queue += version.operation.reads
    return found


def _make(tape: Tape, wanted: Version, *, kept: bool) -> None:
    segment = wanted.segment
    targets = {v for v in tape.dropped if v.segment == segment and v.handles and not v.at_hand and v not in tape.values}
    assert wanted in targets, "somebody waits for a content that nobody waits for"
    assert wanted.operation is not None, "a dropped content has no recipe"
    notes = sorted(needed(targets), key=lambda note: note.index)
    env = _replay(tape, notes, {version.key for version in targets})
    for version in targets:
        tape.values[version] = env[version.key]
        if kept:
            tape.pending[version] = set()
    tape.replayed += 1
    if not kept and not tape.running:
        tape.forget(segment)


def _replay(tape: Tape, notes: list[Operation], targets: set[int]) -> dict[int, UntypedStorage]:
    last: dict[int, int] = {}
    for note in notes:
        for version in note.reads:
            last[version.key] = note.index
    env: dict[int, UntypedStorage] = {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(tape.default_dtype)
    try:
        with tape.quiet(), torch.enable_grad(), _below_autograd(), _without_autocast():
            for note in notes:
                _call(note, env, targets, last)
                for key in [key for key in env if key not in targets and last.get(key, -1) <= note.index]:
                    del env[key]
    finally:
        torch.set_default_dtype(default)
    return env


def _call(note: Operation, env: dict[int, UntypedStorage], targets: set[int], last: dict[int, int]) -> None:
    storages: dict[int, UntypedStorage] = {}
    for version in note.reads:
        if version.key not in storages:
            storages[version.key] = env[version.key] if version.key in env else _source(version, note)
    for before, made in note.writes:
        # What others still read, and what lies outside, is not overwritten.
        ours = before.key in env and before.key not in targets and last[before.key] <= note.index
        if not ours:
            storages[before.key] = copy_of(storages[before.key])
        if made is not None:
            env[made] = storages[before.key]

    args = [_given(argument, storages) for argument in note.args]
    kwargs = {key: _given(argument, storages) for key, argument in note.kwargs.items()}
    if note.random is not None:
        out = _draw(note.function, args, kwargs, *note.random)
    elif note.switches is not None and note.switches != switches():
        with switched(note.switches):
            out = note.function(*args, **kwargs)
    else:
        out = note.function(*args, **kwargs)
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    for tensor, made in zip(outputs, note.makes, strict=False):
        if made is None:
            continue
        key, where = made
        assert (tensor.stride(), tensor.size()) == (where.stride, where.size), f"{note} made another layout"
        env[key] = tensor.untyped_storage()


def _draw(function: Any, args: list[Any], kwargs: dict[str, Any], generator: torch.Generator, state: Tensor) -> Any:
    """Call an operation that draws, from a generator of its own: another thread may be drawing from the device's."""
    found = drawing_from(function)
    if found is not None:
        function, position = found
        own = torch.Generator(generator.device)
        own.set_state(state)
        if 0 <= position < len(args):
            args[position] = own
        else:
            kwargs["generator"] = own
        return function(*args, **kwargs)
    now = generator.get_state()
    generator.set_state(state)
    try:
        return function(*args, **kwargs)
    finally:
        generator.set_state(now)


def _given(argument: Any, storages: dict[int, UntypedStorage]) -> Any:
    # Not a closure: one that calls itself is a cycle, and would hold the storages until the collector comes.
    if isinstance(argument, Reference):
        return argument.geometry.view(storages[argument.version.key])
    if isinstance(argument, list):
        return [_given(part, storages) for part in argument]
    return argument


def _source(version: Version, note: Operation | None) -> UntypedStorage:
    """Return a content that need not be made again; it must be what it was in the forward."""
    if version.copy is not None:
        return version.copy
    if version.packed is not None:
        return unpack(version.packed)
    if version.lent is not None:
        return value(version.lent).untyped_storage()
    assert version.held is not None, f"{note} reads what nobody has kept"
    if version.held._version != version.expected:
        raise changed(version.held, version.expected, note)
    return version.held.untyped_storage()


def changed(tensor: Tensor, expected: int, note: Operation | None) -> StaleSource:
    """Return the error that says that a tensor was changed in place between forward and backward."""
    shape = list(tensor.shape)
    user = f"{note} of the forward" if note is not None else "a backward"
    return StaleSource(
        f"a tensor of shape {shape} was changed in place between forward and backward",
        what=f"{user} needs it; it is at version {tensor._version}, and was at version {expected}",
        why="backward computes with what the forward saw, which is gone",
        fix="change a copy (y = x.clone()), or make the change after backward()",
    )


def _differs(saved: Saved) -> StaleSource:
    maker = saved.version.maker
    assert maker is not None
    return StaleSource(
        f"a tensor of shape {list(saved.geometry.size)} that was made again differs from the forward's",
        what=f"it is output {maker[1]} of operation {maker[0]} of its region",
        why="what it is made from was changed without a trace (through .data or by another library), or the operation "
        "is not deterministic",
        fix="make the change after backward(), or keep this operation's result: recompute(..., keep=...)",
    )


class _without_autocast:  # noqa: N801  (a context, like torch's)
    """Switch autocast off on every device that it may be on; what was cast was noted as casts."""

    def __enter__(self) -> None:
        self._contexts = [
            torch.autocast(device, enabled=False) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
        ]
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)
