"""One step, run while it keeps as little as it can: what it computes, what it saves, and how the bytes move.

The model's forward runs on a tape that drops everything, so that a model that does not fit can be profiled; a ledger
notes every storage of the whole step. From both the planner can tell how any other choice would move the bytes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from gradctl._fit._allocator import Allocated, name_of
from gradctl._fit._forward import digest_of
from gradctl._fit._ledger import OPERATION, Entry, Ledger
from gradctl._fit._levers_head import HeadInPlace
from gradctl._fit._segments import cutting
from gradctl._recompute import Operation, Recording, Tape, Version, outer_hooks, records_graphs

AGAIN = "again"
"""What a storage was made for, if it was made in backward, instead of one that was dropped."""
OTHER = "other"


@dataclass(slots=True)
class Content:
    """A content of a storage that the forward made.

    Args:
        key: a number of its own.
        maker: operation and output, as `RegionPlan` names it.
        operation: position of the operation that made it.
        nbytes: of its storage.
        entry: its storage in the ledger.
        dtype: of the tensor that it was made as.
        final: whether nothing in the forward overwrites it.
        saved: positions at which autograd saved it.
        read: positions of the operations that read it.
        end: the event after which the forward needs it no more.
        used_up: the event at which backward has used it; None where that was not seen.
    """

    key: int
    maker: tuple[int, int]
    operation: int
    nbytes: int
    entry: Entry
    dtype: torch.dtype
    final: bool = True
    saved: list[int] = field(default_factory=list[int])
    read: list[int] = field(default_factory=list[int])
    end: int = 0
    used_up: int | None = None


@dataclass(slots=True)
class Step:
    """An operation of the forward that makes or changes a storage.

    Args:
        index: its position.
        name: as in `aten.mm`.
        reads: keys of the contents that it reads, those from outside left out.
        writes: pairs of keys: what it overwrites, and what it makes of it.
        makes: keys of the contents that it makes.
        seconds: what it took.
        work: bytes that its kernel had for itself while it ran.
    """

    index: int
    name: str
    reads: tuple[int, ...]
    writes: tuple[tuple[int, int], ...]
    makes: tuple[int, ...]
    seconds: float
    work: int = 0


@dataclass
class Call:
    """One call of the model's forward.

    Attributes:
        number: which call of the step it was.
        kind: a digest of its shapes, dtypes and modes.
        functions: every operation, in order.
        cuts: positions at which segments begin, with the module that begins there ("" between two).
        steps: the operations that matter, by position.
        contents: what they made, by key.
        begin, finish: events between which the forward ran.
        replays: for each segment the event at which backward came to it.
        lines: the line of the program for each operation.
    """

    number: int
    kind: str
    functions: tuple[Any, ...] = ()
    cuts: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    steps: dict[int, Step] = field(default_factory=dict[int, Step])
    contents: dict[int, Content] = field(default_factory=dict[int, Content])
    begin: int = 0
    finish: int = 0
    replays: dict[int, int] = field(default_factory=dict[int, int])


@dataclass
class Profile:
    """What one step did.

    Attributes:
        calls: the calls of the model's forward.
        ledger: every storage of the step.
        loss: what the step returned.
        work: by event, the bytes that allocators had given out before it beyond those that the ledger knows: what
            kernels have for themselves, and what autograd holds.
        spared: bytes of gradients that were written in place, where the plain step has a place for each.
    """

    calls: list[Call]
    ledger: Ledger
    loss: Any = None
    work: dict[int, int] = field(default_factory=dict[int, int])
    spared: int = 0


class _Values(dict[Any, Any]):
    """What replay makes, watched: the death of a storage is the moment at which backward has used it up."""

    def __init__(self, tape: _ProfilingTape) -> None:
        super().__init__()
        self._tape = tape

    def __setitem__(self, version: Any, storage: Any) -> None:
        super().__setitem__(version, storage)
        self._tape.made_again(version, storage)


class _ProfilingTape(Tape):
    """A tape that drops everything and remembers what it noted."""

    def __init__(self, call: Call, ledger: Ledger) -> None:
        super().__init__(verify="off", outer=outer_hooks())
        self.call = call
        self.ledger = ledger
        self.values = _Values(self)
        self.again: list[tuple[int, Entry]] = []
        self._made: dict[int, Version] = {}
        call.begin = len(ledger.events)

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.ledger.where = ("forward", self.call.number, self.position)
        try:
            return super().run(function, args, kwargs)
        finally:
            self.ledger.where = OTHER

    def cut_at(self, name: str) -> None:
        """Begin a segment with the name of its module."""
        if self.call.cuts and self.call.cuts[-1][0] == self.position:
            if name:
                self.call.cuts[-1] = (self.position, name)
            return
        self.call.cuts.append((self.position, name))
        self.cut()

    def new_version(self, version: Version, tensor: Tensor) -> None:
        entry = self.ledger.entry(tensor)
        if entry is None or version.maker is None:
            return
        now = len(self.ledger.events)
        self._made[version.key] = version
        self.call.contents[version.key] = Content(
            version.key, version.maker, version.maker[0], version.nbytes, entry, tensor.dtype, end=now
        )

    def noted(self, note: Operation) -> None:
        contents = self.call.contents
        now = len(self.ledger.events)
        reads = tuple(dict.fromkeys(v.key for v in note.reads if v.key in contents))
        for key in reads:
            contents[key].read.append(note.index)
            contents[key].end = now
        writes = tuple((before.key, made) for before, made in note.writes if made is not None and made in contents)
        for before, _ in writes:
            contents[before].final = False
        makes = tuple(made[0] for made in note.makes if made is not None and made[0] in contents)
        if makes or writes:
            seconds = self.ledger.seconds.get(("forward", self.call.number, note.index), 0.0)
            self.call.steps[note.index] = Step(note.index, note.name, reads, writes, makes, seconds)

    def pack(self, tensor: Tensor) -> Any:
        version = self.known(tensor)
        if version is not None and version.key in self.call.contents:
            # By the piece that saves it: its inputs are saved before an operation is called, its outputs after.
            begins = self.call.cuts[self.segment - 1][0] if self.segment else 0
            self.call.contents[version.key].saved.append(begins)
        return super().pack(tensor)

    @contextmanager
    def quiet(self) -> Generator[None]:
        before, self.ledger.where = self.ledger.where, AGAIN
        try:
            with super().quiet():
                yield
        finally:
            self.ledger.where = before

    def finish(self) -> None:
        for key, version in self._made.items():
            assert version.maker is not None
            self.call.contents[key].maker = version.maker
        self._made.clear()
        self.call.functions = tuple(self.functions)
        self.call.finish = len(self.ledger.events)
        super().finish()

    def made_again(self, version: Version, storage: Any) -> None:
        self.call.replays.setdefault(version.segment, len(self.ledger.events))
        entry = self.ledger.entry_of(storage)
        if entry is not None:
            self.again.append((version.key, entry))

    def settle(self) -> None:
        """Read off the ledger when backward had used what, at the end of the step."""
        for key, entry in self.again:
            if key in self.call.contents and entry.died is not None:
                self.call.contents[key].used_up = entry.died
        for content in self.call.contents.values():
            if content.used_up is None and content.saved:
                content.used_up = content.entry.died
        self.again.clear()


class _ProfilingHead(HeadInPlace, _ProfilingTape):
    """The same, where the gradient of a cross-entropy is written in place."""


def profile(
    model: Module,
    step: Callable[[], Any],
    modules: dict[str, Module],
    known: Callable[[], list[Tensor]],
    *,
    head: bool = False,
) -> Profile:
    """Run a step once, keeping as little as it can.

    Args:
        model: whose forward is taped; left as it was.
        step: runs forward, backward and whatever else belongs to a step.
        modules: where the model is cut.
        known: returns the tensors that are there before the step.
        head: write the gradient of a cross-entropy in place.

    Returns:
        What it did.
    """
    with profiling(model, modules, known, head=head) as seen:
        loss = step()
    seen.loss = loss.detach() if isinstance(loss, Tensor) else loss
    return seen


@contextmanager
def profiling(
    model: Module, modules: dict[str, Module], known: Callable[[], list[Tensor]], *, head: bool = False
) -> Generator[Profile]:
    """Profile the step that runs inside; see `profile`. The profile is whole when it is left without an error."""
    device = device_of(model)
    ledger = Ledger(device)
    ledger.where = OTHER
    gc.collect()
    ledger.before(known())
    seen = Profile([], ledger)
    tapes: list[_ProfilingTape] = []
    forward = model.forward

    def taped(*args: Any, **kwargs: Any) -> Any:
        if not records_graphs():
            return forward(*args, **kwargs)
        call = Call(len(seen.calls), digest_of(args, kwargs))
        tape = _ProfilingHead(call, ledger) if head else _ProfilingTape(call, ledger)
        seen.calls.append(call)
        tapes.append(tape)
        with (
            cutting(modules, tape.cut_at),
            torch.autograd.graph.saved_tensors_hooks(tape.pack, tape.unpack),
            Recording(tape),
        ):
            out = forward(*args, **kwargs)
        tape.finish()
        return out

    with forward_of(model, taped), Allocated(known()) as allocated, ledger:
        yield seen
    for tape in tapes:
        tape.settle()
        if isinstance(tape, HeadInPlace):
            seen.spared += sum(tape.spared)
    _settle_work(seen, allocated, name_of(device))


def device_of(model: Module) -> torch.device:
    """Return the device of a model: that of its first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _settle_work(seen: Profile, allocated: Allocated, device: str) -> None:
    """Note what allocators had given out beyond the ledger, by operation."""
    ledger = seen.ledger
    level = [0, *ledger.curve()[1:]]
    total = highest = before = 0
    work: dict[Any, int] = {}
    for change in allocated.changes:
        if change.device == device:
            total += change.nbytes
        highest = max(highest, total)
        if change.mark is None or not change.mark.startswith(OPERATION):
            continue
        where, now = ledger.operations[int(change.mark.removeprefix(OPERATION))]
        beyond = highest - max(level[before : now + 1])
        if beyond > 0 and where == AGAIN:
            pass  # what is called again has the work of the first time
        elif beyond > 0:
            seen.work[now] = max(seen.work.get(now, 0), beyond)
            work[where] = max(work.get(where, 0), beyond)
        before, highest = now, total
    for call in seen.calls:
        for step in call.steps.values():
            step.work = work.get(("forward", call.number, step.index), 0)


@contextmanager
def forward_of(model: Module, forward: Callable[..., Any]) -> Generator[None]:
    """Give a module another forward, in this instance only."""
    had = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = had
