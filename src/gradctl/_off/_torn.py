"""A training step of another thread that the switch has cut in half: noticed, said, and on request stopped.

A forward that ran partly while gradients were off has a graph that ends where the switch was turned; its backward
fills only some gradients and says nothing. Nobody can see that in the graph alone, so two things must come together:

1. At each turn of the switch every other thread is looked at once. One that is inside an `nn.Module`'s forward is
   marked with that module; any other is marked faintly. The thread that turns it is not: it knows what it does.
2. The next backward of a marked thread is walked, and the optimizer step that follows looks whether parameters that
   should have got a gradient did not. What never gets one, and what a step of another kind leaves out, is known from
   the optimizer's state and from its steps that nothing has cut; it is no evidence.

Whatever a mark says, a step that reaches all of its parameters is silent: so is a thread that waited for work at the
turn, one that stood between backward and step, one that evaluates, and the owner's own steps. Not noticed: a step cut
where every parameter is used again after the turn (one cell, unrolled), one whose backward runs in another thread than
its forward, and functional code that updates by hand. Frames, tensors and graphs are never kept: only weak references,
ids and line numbers.

The same walk keeps a process alive. An operation that was being recorded at the very moment at which gradients went off
can leave a node whose backward would read at address 0; see `_saved_strides`. Such a backward is refused in any mode.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import sysconfig
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch

from gradctl import _journal, _taps
from gradctl import _torch_private as private
from gradctl._errors import TornStep, TornStepWarning
from gradctl._off import _site, _state

_FIX = "zero_grad() and repeat the step; turn the switch between steps of other threads, not during their forwards"
_HABIT_STEPS = 16
_MOST_BACKWARDS = 64
_OTHER_STEPS = 8  # of other networks, after which a module's mark is given up
_CALL = getattr(private.find("module_call"), "__code__", None)


class _Mark:
    """What is known of a thread since the last turn of the switch that may have cut its step."""

    __slots__ = (
        "backwards",
        "first",
        "later",
        "missing",
        "module",
        "near",
        "reached",
        "site",
        "steps",
        "strict",
        "thread",
    )

    def __init__(self, thread: Any, site: _site.Site, module: Any, *, near: bool, strict: bool) -> None:
        self.thread: Callable[[], Any] | None = None if thread is None else weakref.ref(thread)
        self.site = site
        self.module: Callable[[], Any] | None = None if module is None else weakref.ref(module)
        self.near = near
        self.strict = strict
        self.steps = 0  # judged since, of other networks
        self.backwards = 0  # noted since
        self.forget_backwards()

    def forget_backwards(self) -> None:
        self.reached: set[int] | None = None  # by any backward since the turn
        self.first: set[int] = set()  # by the first that reached the module
        self.later: set[int] = set()  # by a later one that reached all of that, and more
        self.missing: set[int] | None = None  # of the module, not touched by any

    def is_of(self, thread: threading.Thread | None) -> bool:
        """Whether the mark is this thread's, and not that of a dead one with the same number."""
        return self.thread is None or self.thread() is thread

    def root(self) -> Any:
        return None if self.module is None else self.module()


_marks: dict[int, _Mark] = {}
_turns = 0  # how often gradients went off beside other threads
_looked: dict[int, int] = {}  # at which of these turns each thread's graph was last looked at
_strict = False  # whether the turn that switched off was strict; the turn back acts likewise
_handles: list[_taps.Handle] = []


class _Habit:
    """Which parameters of an optimizer had a gradient in every uncut step that was looked at."""

    __slots__ = ("always", "steps")

    def __init__(self) -> None:
        self.always: set[int] = set()
        self.steps = 0

    def learn(self, optimizer: Any) -> None:
        if self.steps < _HABIT_STEPS:
            having = {id(p) for p in _parameters(optimizer) if p.grad is not None}
            self.always = having if self.steps == 0 else self.always & having
            self.steps += 1


_habits: weakref.WeakKeyDictionary[Any, _Habit] = weakref.WeakKeyDictionary()


def note_toggle(me: int) -> None:
    """Mark every thread but `me`, which turns the switch; called right after each turn, under the switch's lock."""
    global _strict
    if _state.is_shut:
        _strict = _state.strict > 0
    # Before Python 3.12 making a frame object may run the collector, and a finalizer there may let another thread run
    # and leave the very frame that is being looked at.
    collecting = sys.version_info < (3, 12) and gc.isenabled()
    if collecting:
        gc.disable()
    try:
        _look(me)
    finally:
        if collecting:
            gc.enable()


def _look(me: int) -> None:
    global _turns
    frames = sys._current_frames()
    if len(frames) > 1:
        _turns += _state.is_shut
        if not _handles:
            _install()
        threads: dict[int, Any] = threading._active  # type: ignore[attr-defined]  # enumerate() takes a lock
        for ident, frame in frames.items():
            if ident != me:
                _mark(ident, frame, threads.get(ident))
    for known in (_marks, _looked):
        if len(known) > len(frames):
            for ident in known.keys() - frames.keys():
                known.pop(ident, None)


def uninstall() -> None:
    """Forget every mark and stop listening."""
    _marks.clear()
    _looked.clear()
    _habits.clear()
    handles, _handles[:] = list(_handles), []
    for handle in handles:
        handle.remove()


def _install() -> None:
    _handles.extend(
        (
            _taps.engine.subscribe(_watch_backward, order="measure"),
            _taps.zero_grad.subscribe(_watch_zero_grad, order="measure"),
            _taps.optimizer_step.subscribe(before=_before_step, after=_after_step, order="veto"),
        )
    )


def _forget_in_child() -> None:
    _marks.clear()  # the other threads are not in the child
    _looked.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _mark(ident: int, frame: FrameType | None, thread: Any) -> None:
    """Mark a thread by what it is doing: inside a module's forward, in code of the program, or elsewhere."""
    outermost: FrameType | None = None
    inner: FrameType | None = None  # the innermost that is neither torch's nor a wait's
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            outermost = frame
        if inner is None and _kind(code.co_filename) != "passing":
            inner = frame
        frame = frame.f_back
    near = inner is not None and _kind(inner.f_code.co_filename) == "program"
    module = None if outermost is None else outermost.f_locals.get("self")
    known = _marks.get(ident)
    if known is not None and known.is_of(thread):
        if known.reached is not None:
            return  # it has come past its backward: what there is to judge is known already
        if module is None and known.module is not None and not _state.is_shut:
            return  # its forward was cut when gradients went off; they are on again before it came to its backward
    site = (
        _site.NOWHERE if inner is None else _site.Site(inner.f_code.co_filename, inner.f_lineno, inner.f_code.co_name)
    )
    _marks[ident] = _Mark(thread, site, module, near=near, strict=_strict)


@functools.lru_cache(maxsize=4096)
def _kind(file: str) -> str:
    """Say whose a file is: `passing` (torch, gradctl, threading's waits), `library`, or the `program`."""
    if file == threading.__file__ or _site._is_machinery(file):
        return "passing"
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return "library" if any(file.startswith(path + os.sep) for path in libraries) else "program"


def _watch_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    identify = threading.get_ident

    def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        me = identify()
        mark = _marks.get(me)
        if mark is None and _looked.get(me) == _turns:
            return run(outputs, *args, **kwargs)
        _looked[me] = _turns
        reached, broken = _walk(outputs)
        if broken is not None:
            _refuse_broken(broken, mark)
        if mark is None or (len(args) > 3 and args[3]) or not mark.is_of(threading.current_thread()):
            return run(outputs, *args, **kwargs)
        before = _gradients(mark.root())
        result = run(outputs, *args, **kwargs)
        _note_backward(mark, reached, before)
        if mark.backwards > _MOST_BACKWARDS:
            _marks.pop(me, None)  # no optimizer step comes: a program that updates by hand
        return result

    return run_backward


def _note_backward(mark: _Mark, reached: set[int], before: dict[int, tuple[int, int]]) -> None:
    """Note what one backward reached, by its graph and by what it did to the gradients."""
    mark.backwards += 1
    after = _gradients(mark.root())
    touched = reached | {key for key in before if after.get(key) != before[key]}
    mark.reached = touched if mark.reached is None else mark.reached | touched
    untouched = before.keys() - touched
    mark.missing = set(untouched) if mark.missing is None else mark.missing & untouched
    of_module = touched & before.keys()
    if not mark.first:
        mark.first = of_module
    elif mark.first < of_module:
        mark.later |= of_module


def _gradients(module: Any) -> dict[int, tuple[int, int]]:
    """Return which gradient each trainable parameter has now: object and version, `(0, 0)` for none."""
    if module is None:
        return {}
    return {
        id(p): (0, 0) if p.grad is None else (id(p.grad), p.grad._version)
        for p in module.parameters()
        if p.requires_grad
    }


def _walk(outputs: Any) -> tuple[set[int], str | None]:
    """Walk the graph: the ids of the leaves that a backward from `outputs` would fill, and a node that must not run."""
    found: set[int] = set()
    broken: str | None = None
    seen: set[Any] = set()
    stack: list[Any] = []
    for output in outputs if isinstance(outputs, Iterable) and not isinstance(outputs, torch.Tensor) else [outputs]:
        node = getattr(output, "grad_fn", None) or getattr(output, "node", None)
        if node is not None:
            stack.append(node)
        elif isinstance(output, torch.Tensor):
            found.add(id(output))
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for sizes, strides, place in _saved_strides(type(node)):
            # An input that requires no gradient has no edge, and rightly no strides.
            if node.next_functions[place][0] is not None and getattr(node, sizes) and not getattr(node, strides):
                broken = node.name()
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return found, broken


@functools.cache
def _saved_strides(kind: type) -> tuple[tuple[str, str, int], ...]:
    """Return the attributes with which nodes of this kind keep a factor's sizes and strides, and which input it is.

    libtorch saves the strides of a matrix product's inputs only if the input requires a gradient when it comes to
    them, and its backward reads them without looking. A product that was under way when gradients went off has a node
    with no strides, whose backward would read at address 0.
    """
    names = set(dir(kind))
    strides = (name for name in names if name.endswith("_sym_strides"))
    # The two factors are the last two inputs of every matrix product; the second of them is called mat2.
    found = ((name.removesuffix("strides") + "sizes", name, -1 if "mat2" in name else -2) for name in strides)
    return tuple(entry for entry in found if entry[0] in names)


def _refuse_broken(node: str, mark: _Mark | None) -> None:
    name = threading.current_thread().name
    site = _site.find() if mark is None else mark.site
    _journal.emit("torn_step", thread=name, site=site.place())
    raise TornStep(
        f"backward refused in thread {name}: an operation of its graph was cut in half by the switch",
        what=f"a node ({node}) was being recorded when gradients went off (switched {_state.since()})",
        why="it lacks what its backward reads; to run it would end the process",
        fix=_FIX,
    )


def _watch_zero_grad(inner: Callable[..., Any]) -> Callable[..., Any]:
    def zero_grad(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        mark = _marks.get(threading.get_ident())
        if mark is not None and mark.reached is not None:
            mine = {id(p) for p in _parameters(optimizer)}
            if mine & mark.reached:
                mark.forget_backwards()  # what that backward computed is thrown away
        return inner(optimizer, *args, **kwargs)

    return zero_grad


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _has_closure(args, kwargs):
        _judge(optimizer)


def _after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _has_closure(args, kwargs):  # its backwards ran inside of the step
        _judge(optimizer)


def _judge(optimizer: Any) -> None:
    """Look at every marked step that this optimizer step is about to apply; learn from one that nothing has cut."""
    torn: list[tuple[int, _Mark, int, int]] = []
    clean = threading.get_ident() not in _marks
    if any(mark.reached is not None for mark in list(_marks.values())):
        parameters = [p for p in _parameters(optimizer) if p.requires_grad]
        mine = {id(p) for p in parameters}
        for ident, mark in list(_marks.items()):
            if mark.reached is None or not mine & (mark.reached | (mark.missing or set())):
                continue
            clean = False
            lost = _lost(mark, parameters, optimizer)
            if lost:
                torn.append((ident, mark, len(lost), len(parameters)))
            root = mark.root()
            mark.steps += 1
            if root is None or lost or mark.steps > _OTHER_STEPS or any(id(p) in mine for p in root.parameters()):
                _marks.pop(ident, None)
            else:
                mark.forget_backwards()  # another network's step (a GAN's): the module's own is still to come
    if clean:
        habit = _habits.get(optimizer)
        if habit is None:
            habit = _habits[optimizer] = _Habit()
        habit.learn(optimizer)
    for ident, mark, lost_count, of in torn:
        _say(ident, mark, lost_count, of)


def _lost(mark: _Mark, parameters: list[Any], optimizer: Any) -> list[Any]:
    """Return the parameters whose gradient the turn has cost."""
    reached, strong = mark.reached or set(), mark.module is not None
    in_module = (mark.missing or set()) | (mark.later - mark.first)
    lost = [
        p
        for p in parameters
        if id(p) in mark.later - mark.first
        or (id(p) not in reached and ((strong and id(p) in in_module) or _is_empty(p.grad)))
    ]
    if not lost:
        return lost
    habit = _habits.get(optimizer)
    if habit is not None and habit.steps:
        return [p for p in lost if id(p) in habit.always]
    if any(optimizer.state.get(p) for p in parameters):
        return [p for p in lost if optimizer.state.get(p)]
    return lost if strong or mark.near else []


def _is_empty(grad: Any) -> bool:
    return grad is None or not bool(grad.any())


def _parameters(optimizer: Any) -> Iterable[Any]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _say(ident: int, mark: _Mark, lost: int, of: int) -> None:
    """Write the event, then raise in strict mode or warn."""
    thread = None if mark.thread is None else mark.thread()
    name = str(ident) if thread is None else thread.name
    root = mark.root()
    where = f"the forward of {type(root).__name__}" if root is not None else "its forward"
    _journal.emit("torn_step", thread=name, site=mark.site.place())
    error = TornStep(
        f"a training step of thread {name} was cut by the switch: {lost} of {of} parameters got no gradient",
        what=f"{where} was at {mark.site} when gradients were switched ({_state.since()})",
        why="what ran while gradients were off is missing from its graph, and what lies before that with it",
        fix=_FIX,
    )
    if mark.strict:
        raise error
    warnings.warn(TornStepWarning(str(error)), stacklevel=_site.depth() + 1)
