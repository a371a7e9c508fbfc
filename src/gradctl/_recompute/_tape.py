"""The tape of a region: what its forward computed, operation by operation, below autograd.

A region's Python runs once. Under it a dispatch mode notes each operation with references to the storages that it
reads, and saved-tensor hooks decide, for each tensor that autograd saves, whether it is kept or dropped. What was
dropped is made again in backward by calling the same operations on the same storages (`_replay`), so that a changed
global, an iterator or somebody's random generator cannot change the answer.

Each write into a storage makes a new *version* of it, so that the notes form a graph in which every value has one
maker: a tensor that was saved and then overwritten is rebuilt as it was when it was saved. A version that is not on
the tape (parameters, inputs, what custom operations return) is held by an alias, and must not have changed when it is
needed.

A region may be cut into segments. What one segment makes is outside for the next, which holds it where it needs it, so
that each is made again by itself, when backward comes to it: one tape serves a whole model.

A plan only says what need not be noted. An operation that is noted, and reads something that is not, makes the tape
hold it; so a plan that no longer fits costs memory and never changes a result.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from gradctl import _torch_private as private
from gradctl._recompute._notes import Keep, Made, Maker, Operation, Reference, RegionPlan, Version
from gradctl._recompute._operations import Signature, signature
from gradctl._recompute._storage import Geometry, Verify, alias, copy_of, fingerprint, geometry, pack
from gradctl._recompute._switches import switches

_SMALL = 4096
"""Bytes up to which a tensor from outside is copied: step counters and statistics then may change before backward."""
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


_no_modes = private.get("no_dispatch_modes")
_no_dispatch = private.get("no_torch_dispatch")


class Saved:
    """What stands in autograd's graph for a saved tensor that was dropped or packed."""

    __slots__ = ("__weakref__", "fingerprint", "geometry", "tape", "version")

    def __init__(self, tape: Tape, version: Version, where: Geometry, found: Any) -> None:
        self.tape = tape
        self.version = version
        self.geometry = where
        self.fingerprint = found
        version.handles += 1

    def move(self, version: Version, tensor: Tensor) -> None:
        """Wait for another version instead."""
        self.version.handles -= 1
        version.handles += 1
        self.version = version
        if self.fingerprint is not None:
            with _no_dispatch():
                self.fingerprint = fingerprint(self.geometry.view(tensor.untyped_storage()), self.tape.verify)

    def __del__(self) -> None:
        self.version.handles -= 1
        if self.version.handles == 0:
            self.tape.let_go(self.version)


class Kept:
    """What stands in autograd's graph for a saved tensor that was kept."""

    __slots__ = ("expected", "outer", "tensor")

    def __init__(self, tensor: Tensor, outer: Hooks | None) -> None:
        self.expected = tensor._version
        self.outer = outer
        self.tensor = outer[0](tensor) if outer is not None else tensor if tensor.grad_fn is None else alias(tensor)


Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Tape:
    """Notes one run of one region.

    Args:
        plan: what to do in it, where its operations are known.
        keep: asked about every saved content, where there is no plan; None keeps nothing.
        verify: what of a dropped content is remembered, to compare it with what is made again.
        outer: the saved-tensor hooks around the region.
    """

    def __init__(
        self, *, plan: RegionPlan | None = None, keep: Keep | None = None, verify: Verify = "full", outer: Hooks | None
    ) -> None:
        self.plan = plan
        self.keep = keep
        self.verify: Verify = verify
        self.outer = outer
        self.operations: dict[int, list[Operation]] = {}
        self.segment = 0
        self.cuts: list[int] = []
        self.functions: list[Any] = []
        self.position = 0
        self.lost_at: int | None = None
        self.values: dict[Version, UntypedStorage] = {}
        self.bases: dict[Version, tuple[Tensor, int]] = {}
        self.pending: dict[Version, set[int]] = {}
        self.dropped: weakref.WeakSet[Version] = weakref.WeakSet()
        self.default_dtype = torch.get_default_dtype()
        self.lock = threading.RLock()
        self.replayed = 0
        self._cut_at = iter(plan.cuts if plan is not None else ())
        self._next_cut = next(self._cut_at, -1)
        self.running = True
        self.deaf = 0
        self._saved: list[weakref.ref[Saved]] = []
        self._passed: list[tuple[int, Version]] = []
        self._watched: frozenset[int] = frozenset()
        self._versions: dict[int, Version] = {}

    # -- notes --------------------------------------------------------------------------------------------------------

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operation, noting it where that may be needed."""
        if self.deaf:
            return function(*args, **kwargs)
        at = self.position
        self.position = at + 1
        plan = self.plan
        if at == self._next_cut:
            self.segment += 1
            self._next_cut = next(self._cut_at, -1)
        if plan is None:
            self.functions.append(function)
            return self._note(function, args, kwargs, at)
        if self.lost_at is None and (at >= len(plan.functions) or plan.functions[at] is not function):
            self.lost_at = at
        if self.lost_at is None and at in plan.note:
            return self._note(function, args, kwargs, at)
        known = signature(function)
        if known.writes_something and self._versions and self._writes_known(known, args, kwargs):
            return self._note(function, args, kwargs, at)
        out = function(*args, **kwargs)
        if self.lost_at is None and plan.pack and any((at, j) in plan.pack for j in range(_count(out))):
            self._outputs(out, at, None, {})
        return out

    def cut(self) -> None:
        """Begin a new segment; a plan knows its own."""
        if self.plan is None and self.cuts[-1:] != [self.position]:
            self.cuts.append(self.position)
            self.segment += 1

    def _writes_known(self, known: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(self.known(t) is not None for t in _written(known, args, kwargs))

    def known(self, tensor: Tensor) -> Version | None:
        """Return the content of a tensor's storage, if the tape knows it."""
        storage = tensor.untyped_storage()
        found = self._versions.get(storage._cdata)
        return found if found is not None and found.storage() is not None else None

    def _read(self, tensor: Tensor) -> Version:
        """Return the version of a tensor that an operation reads; one that cannot be made again is held from now on."""
        storage = tensor.untyped_storage()
        found = self._versions.get(storage._cdata)
        if found is None or found.storage() is None:
            found = self._versions[storage._cdata] = Version(tensor, storage)
        if (found.operation is None or found.segment != self.segment) and not found.at_hand:
            if found.mutable or (found.nbytes <= _SMALL and found.maker is None):
                found.copy = copy_of(storage)
            else:
                self._hold(found, tensor)
        found.used = True
        return found

    @contextmanager
    def quiet(self) -> Generator[None]:
        """Enter the context in which contents are made again: no mode sees it but those that ask to (`sees_replay`)."""
        with _no_modes() as modes, ExitStack() as stack:
            for mode in modes or ():
                if getattr(mode, "sees_replay", False):
                    stack.enter_context(mode)
            yield

    def new_version(self, version: Version, tensor: Tensor) -> None:
        """Called for each content that an operation makes."""

    def noted(self, note: Operation) -> None:
        """Called for each operation that is noted."""

    def _hold(self, version: Version, tensor: Tensor) -> None:
        """Keep what comes from outside; what a region around this one makes is left to it, for it may drop it."""
        around = getattr(self.outer[0], "__self__", None) if self.outer is not None else None
        if isinstance(around, Tape) and isinstance(lent := around.pack(tensor), Saved):
            version.lent = lent
        else:
            version.hold(tensor)

    def _note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        known = signature(function)
        written = _written(known, args, kwargs) if known.writes_something else ()
        if not known.replayable or not _all_plain(args, kwargs):
            return self._pass(function, args, kwargs, written, at)
        if written and all(self._is_outside(t) for t in written) and not known.hidden:
            return self._pass(function, args, kwargs, written, at)  # what lies outside is read anew, not written again
        note = Operation(function, at)
        note.line = _line()
        note.args = tuple(self._refer(value, note.reads) for value in args)
        if kwargs:
            note.kwargs = {key: self._refer(value, note.reads) for key, value in kwargs.items()}
        if known.random:
            generator = _generator(args, kwargs)
            note.random = (generator, generator.get_state())
        if known.chosen:
            note.switches = switches()
        befores = [self._before_write(tensor) for tensor in written]
        out = function(*args, **kwargs)
        changed: dict[int, Version] = {}
        for j, (tensor, before) in enumerate(zip(written, befores, strict=True)):
            made = self._after_write(tensor, before, (at, -2 - j), note)
            changed[tensor.untyped_storage()._cdata] = made
            if made.operation is note:
                self.new_version(made, tensor)
            note.writes.append((before, made.key if made.operation is note else None))
            if known.quiet and made.operation is note:
                self._follow(before, made, tensor)
        self._outputs(out, at, note, changed)
        self.operations.setdefault(self.segment, []).append(note)
        self.noted(note)
        return out

    def _refer(self, value: Any, reads: list[Version]) -> Any:
        if isinstance(value, Tensor):
            version = self._read(value)
            reads.append(version)
            return Reference(version, geometry(value))
        if isinstance(value, (list, tuple)):
            return [self._refer(part, reads) for part in value]
        return value

    def _is_outside(self, tensor: Tensor) -> bool:
        found = self.known(tensor)
        return found is None or found.operation is None

    def _before_write(self, tensor: Tensor) -> Version:
        version = self._read(tensor)
        version.keep_copy(tensor.untyped_storage())
        return version

    def _after_write(self, tensor: Tensor, before: Version, maker: Maker, note: Operation) -> Version:
        storage = tensor.untyped_storage()
        outside = before.operation is None
        made = Version(tensor, storage) if outside else Version(tensor, storage, maker, note)
        made.mutable = outside
        if outside:
            self._passed.append((maker[0], made))
        made.segment = self.segment
        self._versions[storage._cdata] = made
        return made

    def _follow(self, before: Version, made: Version, tensor: Tensor) -> None:
        """Let what was saved of a version mean the one that was quietly written over it, as it does to autograd."""
        for reference in self._saved:
            saved = reference()
            if saved is not None and saved.version is before:
                saved.move(made, tensor)
                self.dropped.add(made)

    def _pass(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Iterable[Tensor], at: int
    ) -> Any:
        """Call an operation that is not noted; what it writes comes from outside from now on."""
        for tensor in written:
            version = self.known(tensor)
            if version is not None:
                version.keep_copy(tensor.untyped_storage())
        out = function(*args, **kwargs)
        for tensor in written:
            if _is_plain(tensor):
                storage = tensor.untyped_storage()
                made = self._versions[storage._cdata] = Version(tensor, storage)
                made.mutable = True
                self._passed.append((at, made))
        return out

    def _outputs(self, out: Any, at: int, note: Operation | None, changed: dict[int, Version]) -> None:
        for j, tensor in enumerate(out if isinstance(out, (tuple, list)) else (out,)):
            if not _is_plain(tensor):
                if note is not None:
                    note.makes.append(None)
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            made = changed.get(key)
            if made is not None:
                if made.maker is not None:
                    made.maker = (at, j)
                if note is not None:
                    note.makes.append(None)
                continue
            found = self._versions.get(key)
            if found is not None and found.storage() is not None:
                if note is not None:
                    note.makes.append(None)  # a view of what is there
                continue
            made = self._versions[key] = Version(tensor, storage, (at, j), note)
            made.segment = self.segment
            self.new_version(made, tensor)
            if note is not None:
                note.makes.append((made.key, geometry(tensor)))

    # -- autograd's hooks ---------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """Take a tensor that autograd saves: keep, pack or drop it."""
        if not _is_plain(tensor):
            return self._keep(tensor)
        version = self.known(tensor)
        if version is None or version.maker is None or not self._is_dropped(version, tensor):
            return self._keep(tensor)
        where = geometry(tensor)
        found = None
        if self.verify != "off" and version.packed is None and not _is_unwritten(version):
            found = fingerprint(tensor, self.verify)
        self.dropped.add(version)
        saved = Saved(self, version, where, found)
        self._saved.append(weakref.ref(saved))
        return saved

    def _keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor; what the hooks around the region do with it is no part of the region."""
        self.deaf += 1
        try:
            return Kept(tensor, self.outer)
        finally:
            self.deaf -= 1

    def _is_dropped(self, version: Version, tensor: Tensor) -> bool:
        assert version.maker is not None
        if version.segment != self.segment and version.operation is not None:
            if not version.at_hand:
                self._hold(version, tensor)
            return False
        if self.plan is None:
            if version.operation is None:
                return False
            if self.keep is None:
                return True
            dtype, shape = version.layout
            asked = Made(version.operation.function, shape, dtype, version.nbytes, version.operation.line)
            if self.keep(asked):
                version.hold(tensor)
                return False
            return True
        codec = self.plan.pack.get(version.maker) if self.plan.pack else None
        if codec is not None:
            if version.packed is None:
                version.packed = pack(tensor.untyped_storage(), tensor.dtype, codec)
            return version.packed is not None
        return version.operation is not None and version.maker in self.plan.drop

    def unpack(self, saved: Any) -> Tensor:
        """Return a saved tensor, making it again where it was dropped."""
        from gradctl._recompute import _replay

        if type(saved) is Saved:
            return _replay.value(saved)
        if saved.outer is not None:
            return saved.outer[1](saved.tensor)
        if saved.tensor._version != saved.expected:
            raise _replay.changed(saved.tensor, saved.expected, None)
        return saved.tensor

    # -- the end of the forward ---------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let go of everything that no dropped content needs."""
        from gradctl._recompute._replay import needed

        while True:
            notes = needed(version for version in self.dropped if version.packed is None)
            read = {version for note in notes for version in note.reads}
            idle = [v for v in self.dropped if v.operation is not None and v.at_hand and v not in read]
            idle = [v for v in idle if v.packed is None]
            if not idle:
                break
            for version in idle:
                version.release()  # a later segment had read it, for something that nobody needs
        self.operations = {
            segment: left
            for segment, of_segment in self.operations.items()
            if (left := [note for note in of_segment if note in notes])
        }
        for version in (*self._versions.values(), *read):
            if version not in read and version not in self.dropped:
                version.release()
                version.operation = None
            elif version.at_hand:
                version.operation = None
        self._watched = frozenset(at for at, version in self._passed if version in read)
        self.running = False
        self._versions.clear()
        self._passed.clear()
        self._saved.clear()

    def learn(self) -> RegionPlan:
        """Return a plan that does again what this run did."""
        if self.plan is not None:
            return self.plan
        return RegionPlan(
            functions=tuple(self.functions),
            note=frozenset(note.index for notes in self.operations.values() for note in notes) | self._watched,
            drop=frozenset(version.maker for version in self.dropped if version.maker is not None),
            cuts=tuple(self.cuts),
        )

    def let_go(self, version: Version) -> None:
        """Let go of a content that was made again."""
        self.values.pop(version, None)
        self.bases.pop(version, None)

    def forget(self, segment: int) -> None:
        """Let go of the notes of a segment: everything that it dropped is at hand."""
        self.operations.pop(segment, None)
        for version in self.dropped:
            if version.segment == segment:
                version.operation = None


class Recording(TorchDispatchMode):
    """Lets a tape hear the operations below autograd."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._run = tape.run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Hand an operation to the tape."""
        return self._run(func, args, kwargs or {})


def outer_hooks() -> Hooks | None:
    """Return the saved-tensor hooks that stand around what is called now."""
    top = private.find("saved_hooks_on_top")
    return None if top is None else top(True)


def _is_unwritten(version: Version) -> bool:
    note, maker = version.operation, version.maker
    return note is not None and maker is not None and maker[1] in signature(note.function).unwritten


def _count(out: Any) -> int:
    return len(out) if isinstance(out, (tuple, list)) else 1


def _written(known: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    values = [args[i] for i in (*known.writes, *known.hidden) if i < len(args)]
    values += [kwargs[name] for name in known.named_writes if name in kwargs]
    flat = [part for value in values for part in (value if isinstance(value, (list, tuple)) else (value,))]
    once: dict[int, Tensor] = {}
    for part in flat:
        if isinstance(part, Tensor):
            once.setdefault(part.untyped_storage()._cdata, part)
    return list(once.values())


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with a storage that operations read and write as they say."""
    return type(value) in _PLAIN and value.layout is torch.strided and not value.is_nested


def _all_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            if not _is_plain(value):
                return False
        elif isinstance(value, (list, tuple)) and not _all_plain(tuple(value), {}):
            return False
    return True


def _generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
    device = kwargs.get("device")
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Generator):
            return value
        if device is None and isinstance(value, Tensor):
            device = value.device
    if device is not None and torch.device(device).type == "cuda":
        where = torch.device(device)
        return torch.cuda.default_generators[torch.cuda.current_device() if str(where) == "cuda" else where.index]
    return torch.default_generator


_OWN = __file__.rpartition("/")[0]
_TORCH = torch.__file__.rpartition("/")[0]


def _line() -> tuple[str, int] | None:
    frame: Any = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _OWN, "<")):
            return name, frame.f_lineno
        frame = frame.f_back
    return None
