"""Engine "rerun": what a region's forward saved is dropped, and its Python function is run again in backward.

No operation is noted, so that a region of many tiny operations pays for none of them. In exchange the second run must
be made equal to the first: what the function sees is put back (`_surroundings`), what it changes is put back after it,
and each tensor that is made again is compared with a fingerprint of the one that was dropped. The gradient of a region
depends on what its forward saved and on nothing else, so that with verify="full" a second run that differs raises.

Source: torch.utils.checkpoint (non-reentrant). Differs: buffers, random state outside of torch, attributes, lists and
modes are put back; contents are compared, not shapes; the error names what changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from gradctl._errors import GradctlError, StaleSource
from gradctl._recompute._bits import Saved, bits_of
from gradctl._recompute._replay import _graph_is_kept, changed
from gradctl._recompute._storage import Verify
from gradctl._recompute._surroundings import LARGEST_COPY, Modes, Reach, Snapshot, version_of
from gradctl._recompute._tape import _PLAIN, Hooks, _no_dispatch, outer_hooks

_BATCH: Final = 64
_BATCH_BYTES: Final = 1 << 20
_OF_ONE_OPERATION: Final = 4
"""Most tensors that one operation saves and writes afterwards."""
_hooks = torch.autograd.graph.saved_tensors_hooks


class Rerun:
    """A function that is run again in backward.

    Args:
        function: what to call.
        verify: what of a dropped tensor is remembered, to compare it with what is made again.
    """

    keep = None

    def __init__(self, function: Callable[..., Any], *, verify: Verify) -> None:
        self.function = function
        self.verify: Verify = verify
        self.moving: set[int] | None = None

    def of(self, function: Callable[..., Any]) -> Rerun:
        """Return the same for another function."""
        return Rerun(function, verify=self.verify)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function; the same values, and in backward the same gradients, bit for bit."""
        run = _Run(self, args, kwargs)
        with _hooks(run.pack, run.unpack):
            out = self.function(*args, **kwargs)
        run.finish()
        return out


class _Dropped:
    """What stands in autograd's graph for a saved tensor that is made again."""

    __slots__ = ("__weakref__", "value")

    def __init__(self) -> None:
        self.value: Tensor | None = None


class _Outside:
    """What stands in autograd's graph for a saved tensor that was there before the region: it is kept."""

    __slots__ = ("expected", "outer", "tensor")

    def __init__(self, tensor: Tensor, outer: Hooks | None) -> None:
        self.expected = version_of(tensor)
        self.outer = outer
        self.tensor = outer[0](tensor) if outer is not None else tensor if tensor.grad_fn is None else _detached(tensor)


class _Argument:
    """A tensor among the arguments, held without its history."""

    __slots__ = ("after", "before", "kept", "requires_grad")

    def __init__(self, tensor: Tensor, outer: Hooks | None) -> None:
        self.before = self.after = version_of(tensor)
        self.kept = _Outside(tensor, outer)
        self.requires_grad = tensor.requires_grad

    def version(self) -> int:
        return self.before if self.kept.outer is not None else version_of(self.kept.tensor)

    def given(self) -> Tensor:
        kept = self.kept
        tensor = kept.tensor if kept.outer is None else kept.outer[1](kept.tensor)
        if not self.requires_grad and tensor.grad_fn is None and not tensor.requires_grad:
            return tensor
        return tensor.detach().requires_grad_(self.requires_grad)


class _Enough(BaseException):
    """Everything that is needed was made again. Not an Exception: the region's own handlers must not catch it."""


class _Run:
    """One call of a region: what it saved, and how to run it again."""

    def __init__(self, owner: Rerun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.owner = owner
        self.verify: Verify = owner.verify
        self.outer = outer_hooks()
        self.lock = threading.RLock()
        self.dropped: list[weakref.ref[_Dropped]] = []
        self.ends: list[int] = []
        self.bits: list[Any] = []
        self._batch: list[Saved] = []
        self._batch_bytes = 0
        self._batch_before: list[Saved] = []
        self.made = 0
        self.finished = False
        self.arguments: list[_Argument] = []
        self.modes = Modes()
        reach = Reach()
        reach.function(owner.function)
        self.args = tuple(self._held(value, reach) for value in args)
        self.kwargs = {key: self._held(value, reach) for key, value in kwargs.items()}
        moving = owner.moving
        self.before = Snapshot(
            reach,
            [
                i
                for i, tensor in enumerate(reach.tensors)
                if tensor.nbytes <= LARGEST_COPY or moving is None or id(tensor) in moving or id(tensor) in reach.quiet
            ],
        )
        # Addresses, good while the storages live: what is in reach is held, an argument may be gone in the second run.
        self.lasting = {t.untyped_storage()._cdata for t in (*reach.params, *reach.tensors)}
        self.outside = self.lasting | {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        self.after: list[int] = []

    def _held(self, value: Any, reach: Reach) -> Any:
        if isinstance(value, Tensor):
            reach.value(value)
            argument = _Argument(value, self.outer)
            self.arguments.append(argument)
            return argument
        if type(value) in (list, tuple):
            return type(value)([self._held(part, reach) for part in value])
        if type(value) is dict:
            return {key: self._held(part, reach) for key, part in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._held(part, reach) for part in value))
        reach.value(value)
        return value

    # -- the forward --------------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """Take a tensor that autograd saves: keep what was there before, drop the rest."""
        storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0
        if storage in self.outside or type(tensor) not in _PLAIN:
            return _Outside(tensor, self.outer)
        batch = self._batch
        batch.append((storage, tensor))
        if self.verify != "off":
            self._batch_bytes += tensor.nbytes if storage else 0
            if len(batch) == _OF_ONE_OPERATION:
                self._batch_before = []
            if len(batch) >= _BATCH or self._batch_bytes >= _BATCH_BYTES:
                self._close(batch)
        elif len(batch) > _OF_ONE_OPERATION:
            del batch[0]
        dropped = _Dropped()
        self.dropped.append(weakref.ref(dropped))
        return dropped

    def _close(self, batch: list[Saved]) -> None:
        self.ends.append(len(self.dropped) + 1)
        self.bits.append(bits_of(batch, self.verify))
        # What the last operation saved may be written after it was saved (RReLU's noise): the end looks once more.
        self._batch_before, self._batch, self._batch_bytes = batch, [], 0

    def finish(self) -> None:
        """The forward has ended: learn what it changed."""
        before, reach, owner = self.before, self.before.reach, self.owner
        batch = self._batch
        if self.verify == "off":
            if batch:
                self.ends += [len(self.dropped) - len(batch), len(self.dropped)]
                self.bits += [None, bits_of(batch, "sample")]
        elif batch or self._batch_before:
            if self._batch_before:
                self.ends.pop()
                self.bits.pop()
            self.ends.append(len(self.dropped))
            self.bits.append(bits_of([*self._batch_before, *batch], self.verify))
        self._batch, self._batch_before = [], []
        self.after = [version_of(tensor) for tensor in reach.tensors]
        self.finished = True
        moved = {
            id(tensor)
            for i, tensor in enumerate(reach.tensors)
            if self.after[i] != before.versions[i] or id(tensor) in reach.quiet
        }
        owner.moving = moved if owner.moving is None else owner.moving | moved
        for i in list(before.copies):
            tensor = reach.tensors[i]
            if tensor.nbytes > LARGEST_COPY and id(tensor) not in moved:
                del before.copies[i]
        for argument in self.arguments:
            argument.after = argument.version()

    # -- backward -----------------------------------------------------------------------------------------------------

    def unpack(self, saved: Any) -> Tensor:
        """Return a saved tensor, running the region again where it was dropped."""
        if type(saved) is _Outside:
            if saved.outer is not None:
                return saved.outer[1](saved.tensor)
            if version_of(saved.tensor) != saved.expected:
                raise changed(saved.tensor, saved.expected, None)
            return saved.tensor
        with self.lock:
            if saved.value is None:
                self._again()
            value = saved.value
            assert value is not None, "a run that did not reach this tensor has raised"
            if _graph_is_kept():
                saved.value = None  # the next pass makes it again
            return value

    def _again(self) -> None:
        if self.finished:
            self._check_sources()
            self._run()
            return
        # The region itself goes back through a part of its own graph: everything that it has saved by now is needed.
        ends, bits = list(self.ends), list(self.bits)
        if ends[-1:] != [len(self.dropped)]:
            self.ends.append(len(self.dropped))
            self.bits.append(bits_of(self._batch, self.verify) if self.verify != "off" else None)
        try:
            self._run()
        finally:
            self.ends, self.bits = ends, bits

    def _run(self) -> None:
        waiting = [i for i, reference in enumerate(self.dropped) if reference() is not None]
        collector = _Collector(self, waiting[-1])
        before = self.before
        now = Snapshot(before.reach, before.copies)
        try:
            # Function modes, autocast and the rest first: what is put back may depend on none of them.
            with self.modes.entered():
                before.put()
                args = _given(self.args)
                kwargs = _given(self.kwargs)
                collector.outside = self.lasting | {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
                with torch.enable_grad(), _hooks(collector.pack, collector.unpack):
                    self.owner.function(*args, **kwargs)
        except _Enough:
            pass
        except (torch.OutOfMemoryError, GradctlError):
            raise
        except Exception as fault:
            raise self._differs(f"running it again raised {type(fault).__name__}: {fault}") from fault
        finally:
            now.put()
        collector.finish()
        self.made += 1

    def _check_sources(self) -> None:
        """Raise where an argument or a tensor in reach is not what the region began with, and no copy is at hand."""
        reach, before = self.before.reach, self.before
        copied = {id(reach.tensors[i]) for i in before.copies}
        found = [(t, before.versions[i], self.after[i]) for i, t in enumerate(reach.tensors) if i not in before.copies]
        found += [
            (a.kept.tensor, a.before, a.after)
            for a in self.arguments
            if a.kept.outer is None and id(a.kept.tensor) not in copied
        ]
        for tensor, begin, end in found:
            if begin != end:
                raise StaleSource(
                    f"a tensor of shape {list(tensor.shape)} was changed in place by the region that began with it",
                    what=f"it was at version {begin} before the region and at version {end} after it",
                    why='engine="rerun" runs the region again from its inputs, and what they were is gone',
                    fix='recompute(..., engine="tape"), or change a copy inside (y = x.clone())',
                )
            if version_of(tensor) != end and self.verify != "full":
                raise changed(tensor, end, None)
        if self.verify != "full" and getattr(self.owner.function, "__name__", "") == "forward":
            for param, version in zip(reach.params, before.params, strict=True):
                if param._version != version:
                    raise changed(param, version, None)

    def _differs(self, what: str) -> StaleSource:
        reach, before = self.before.reach, self.before
        moved = [
            f"a parameter of shape {list(p.shape)}"
            for p, version in zip(reach.params, before.params, strict=True)
            if p._version != version
        ]
        moved += [
            f"a tensor of shape {list(a.kept.tensor.shape)}"
            for a in self.arguments
            if a.kept.outer is None and version_of(a.kept.tensor) != a.after
        ]
        name = getattr(self.owner.function, "__qualname__", type(self.owner.function).__name__)
        why = (
            f"{moved[0]} was changed in place since its forward"
            if moved
            else "it reads something that changed since its forward: a global, a file, an iterator, data behind .data"
        )
        return StaleSource(
            f"{name}, run again in backward, did not compute what it computed in the forward",
            what=what,
            why=why,
            fix='recompute(..., engine="tape"), which notes operations and runs no Python again',
        )


class _Collector:
    """Takes what the second run saves, in the order of the first."""

    def __init__(self, run: _Run, last: int) -> None:
        self.run = run
        self.verify: Verify = run.verify if run.verify != "off" else "sample"
        self.index = 0
        self.number = 0
        while run.ends[self.number] == 0:
            self.number += 1
        self.end = next(end for end in run.ends if end > last)
        self.outside: set[int] = set()
        self.batch: list[Saved] = []
        self.unlike: list[tuple[int, list[Saved]]] = []

    def pack(self, tensor: Tensor) -> Any:
        """Take what is saved now for what was dropped then."""
        run = self.run
        storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0
        if storage in self.outside or type(tensor) not in _PLAIN:
            return _Outside(tensor, run.outer) if run.outer is not None else _detached(tensor)
        value = _detached(tensor)
        index = self.index
        if index >= self.end:
            return value
        self.index = index = index + 1
        dropped = run.dropped[index - 1]()
        if dropped is not None:
            dropped.value = value
        self.batch.append((storage, value))
        if index == run.ends[self.number]:
            self._compare()
            if index == self.end and not self.unlike:
                raise _Enough
        return value

    def _compare(self) -> None:
        expected = self.run.bits[self.number]
        if expected is not None and bits_of(self.batch, self.verify) != expected:
            self.unlike.append((self.number, self.batch))
        self.batch = []
        self.number += 1
        ends = self.run.ends
        while self.number < len(ends) and ends[self.number] == self.index:
            self.number += 1

    def unpack(self, value: Any) -> Tensor:
        if type(value) is _Outside:
            assert value.outer is not None
            return value.outer[1](value.tensor)
        return value

    def finish(self) -> None:
        """Compare once more what differed while it was saved, for it may have been written after."""
        run = self.run
        if self.index < self.end:
            self._forget()
            raise run._differs(f"it saved {self.index} tensors for backward, and {self.end} or more before")
        for number, batch in self.unlike:
            if bits_of(batch, self.verify) != run.bits[number]:
                self._forget()
                shapes = ", ".join(dict.fromkeys(str(list(tensor.shape)) for _, tensor in batch))
                raise run._differs(f"among the tensors of shape {shapes} that it saved, one has other bits than before")

    def _forget(self) -> None:
        for reference in self.run.dropped:
            dropped = reference()
            if dropped is not None:
                dropped.value = None


def _detached(tensor: Tensor) -> Tensor:
    """Return a tensor without its history; no mode sees it made, such as that of a tape inside of the region."""
    with _no_dispatch():
        return tensor.detach()


def _given(held: Any) -> Any:
    if isinstance(held, _Argument):
        return held.given()
    if type(held) in (list, tuple):
        return type(held)([_given(part) for part in held])
    if type(held) is dict:
        return {key: _given(part) for key, part in held.items()}
    if isinstance(held, tuple) and hasattr(held, "_fields"):
        return type(held)(*(_given(part) for part in held))
    return held


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.layout is torch.strided else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
