"""The first, cheap look of `gradctl explain`: is anything wrong with the gradients of this run, and since when?

It never says why. It listens to the engine, to optimizer steps and to the clearing of gradients, looks into graphs and
at lines (see `_crumbs`) in a few steps only, and may be wrong on the careful side: a second, traced run is silent about
what is harmless.
"""

from __future__ import annotations

import os
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from gradctl import _taps
from gradctl._explain._crumbs import CrumbMode
from gradctl._explain._gradient_errors import is_gradient_error
from gradctl._explain._held import DENSE, Held
from gradctl._explain._passages import Leaf, Passages
from gradctl._explain._symptoms import Symptom
from gradctl._lineage import Frames, let_workers_finish
from gradctl._names import NameBook

_WITHOUT_OPTIMIZER = 8
_EVERY = ((64, 8), (1024, 64))
_SELDOM = 512
_LEFT_OUT = 3
_KEPT = 3
_SHOWN = 3


class Sentinel:
    """Watches a run at almost no cost, beside the recorder.

    Nothing that goes wrong in here reaches the program; it is said in the result under `faults`.

    Args:
        into: installed packages that count as the user's code.
    """

    def __init__(self, *, into: Sequence[str] = ()) -> None:
        self._mode = CrumbMode(Frames(into))
        self._book = NameBook()
        self._passages = Passages()
        self._helds: dict[int, Held] = {}
        self._gone: list[Held] = []
        self._handles: list[_taps.Handle] = []
        self._faults: list[str] = []
        self._order = 0
        self._last_backward = -1
        self._missing_inputs = 0
        self._looking = False
        self._may_look = True
        self._off = True
        self._pid = os.getpid()

    def install(self) -> None:
        """Begin to watch, in this thread and the engine of all; a second call does nothing."""
        if self._handles:
            return
        self._off = False
        self._pid = os.getpid()
        self._book.start()
        self._handles = [
            _taps.engine.subscribe(self._around_engine, order="record"),
            _taps.optimizer_step.subscribe(after=self._stepped, order="record"),
            _taps.optimizer_created.subscribe(self._created, order="record"),
            _taps.zero_grad.subscribe(self._around_zero_grad, order="record"),
            _taps.module_zero_grad.subscribe(self._around_module_zero_grad, order="record"),
            _taps.compile.subscribe(self._around_compile, order="record"),
            _taps.group_destroyed.subscribe(let_workers_finish, order="measure"),
        ]
        self._open()
        _installed.add(self)

    def finish(self, error: BaseException | None) -> dict[str, Any]:
        """Stop watching, put everything back and say what was seen.

        Args:
            error: what ended the program, or None.

        Returns:
            `symptoms` and `crumbs` as plain mappings, `steps` of the optimizer that made most, and `faults`.
        """
        symptoms: list[Symptom] = []
        try:
            if not self._off:
                self._name_all()
                symptoms = self._symptoms(error)
        except Exception as fault:
            self._note(fault)
        finally:
            self.uninstall()
        for fault in self._mode.faults[:3]:
            self._note(fault)
        return {
            "symptoms": [symptom.to_json() for symptom in symptoms],
            "crumbs": [crumb.finding().to_json() for crumb in self._mode.crumbs()],
            "steps": self._steps,
            "faults": self._faults,
        }

    def uninstall(self) -> None:
        """Put everything back; a second call does nothing."""
        self._off = True
        _installed.discard(self)
        self._close()
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        self._book.stop()

    @property
    def _steps(self) -> int:
        return max((held.steps for held in self._all()), default=0)

    def _all(self) -> list[Held]:
        return [*self._gone, *self._helds.values()]

    def _note(self, fault: BaseException) -> None:
        where = traceback.extract_tb(fault.__traceback__)[-1]
        if len(self._faults) < 10:
            self._faults.append(f"{type(fault).__name__}: {fault} ({os.path.basename(where.filename)}:{where.lineno})")

    def _broken(self, fault: BaseException) -> None:
        """Stop for good after a fault of ours; the taps pass through from now on."""
        self._off = True
        self._note(fault)

    # ---------------------------------------------------------------------------------------------- looking at lines

    def _open(self) -> None:
        if self._may_look and not self._looking and not self._mode.faults:
            self._looking = True
            self._mode.open()

    def _close(self) -> None:
        if self._looking:
            self._looking = False
            self._mode.close()

    def _turn(self, steps: int) -> None:
        """Open and close the eyes for the step after `steps`."""
        if not _looked_at(steps + 1) or self._mode.weary:
            self._close()
        else:
            self._open()
        self._mode.step = steps + 1

    def _around_compile(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def compile_(*args: Any, **kwargs: Any) -> Any:
            # A compiled region would trace into the function mode: from here on lines are not looked at.
            self._may_look = False
            self._close()
            return inner(*args, **kwargs)

        return compile_

    # ---------------------------------------------------------------------------------------------- events

    def _around_engine(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._off:
                return inner(outputs, *args, **kwargs)
            leaves: list[Tensor] = []
            functions: set[Any] = set()
            try:
                leaves, functions = self._passages.begun(outputs, look=self._looking)
            except Exception as fault:
                self._broken(fault)
            out = inner(outputs, *args, **kwargs)
            try:
                self._passed(out, leaves, functions, accumulates=bool(kwargs.get("accumulate_grad", True)))
            except Exception as fault:
                self._broken(fault)
            return out

        return run_backward

    def _passed(self, out: Any, leaves: list[Tensor], functions: set[Any], *, accumulates: bool) -> None:
        if accumulates:
            self._order += 1
            self._last_backward = self._order
            for held in self._helds.values():
                held.went_back()
        elif isinstance(out, (tuple, list)) and any(value is None for value in out):
            self._missing_inputs += 1
        if not self._looking:
            return
        self._mode.settle(functions)
        if accumulates:
            self._mode.backwards += 1
            self._passages.ended(leaves)
        if not self._all() and self._passages.count >= _WITHOUT_OPTIMIZER:
            self._close()

    def _created(self, inner: Any) -> Any:
        def created(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            out = inner(optimizer, *args, **kwargs)
            if not self._off:
                self._held(optimizer)
            return out

        return created

    def _held(self, optimizer: Any) -> Held:
        held = self._helds.get(id(optimizer))
        if held is None or held.ref() is not optimizer:
            if held is not None:
                self._gone.append(held)
            held = self._helds[id(optimizer)] = Held(optimizer)
        return held

    def _stepped(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._off:
            return
        try:
            self._order += 1
            held = self._held(optimizer)
            held.stepped(optimizer, self._order, self._last_backward)
            if held.steps <= DENSE or self._looking:
                self._passages.hold(held.ids)
                self._name(held)
            self._turn(self._steps)
        except Exception as fault:
            self._broken(fault)

    def _around_zero_grad(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._off:
                self._clears([self._held(optimizer)])
            return inner(optimizer, *args, **kwargs)

        return zero_grad

    def _around_module_zero_grad(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(module: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._off:
                self._clears(self._helds.values())
            return inner(module, *args, **kwargs)

        return zero_grad

    def _clears(self, whose: Iterable[Held]) -> None:
        self._order += 1
        try:
            for held in whose:
                held.clears(self._order, self._last_backward)
        except Exception as fault:
            self._broken(fault)

    # ---------------------------------------------------------------------------------------------- names

    def _name(self, held: Held) -> None:
        """Look for names while the functions that hold the models are still running."""
        params = [p for ref in held.params if (p := ref()) is not None]
        if None in held.names and len(params) == len(held.names):
            held.names = list(self._book.names_for(params).names)

    def _name_all(self) -> None:
        for held in self._all():
            self._name(held)
        leaves = [(leaf, tensor) for leaf in self._passages.trained_by_nobody() if (tensor := leaf.ref()) is not None]
        if leaves:
            names = self._book.names_for([tensor for _, tensor in leaves]).names
            for (leaf, _), name in zip(leaves, names, strict=True):
                leaf.name = name

    # ---------------------------------------------------------------------------------------------- the result

    def _symptoms(self, error: BaseException | None) -> list[Symptom]:
        found: list[Symptom] = []
        if error is not None and is_gradient_error(error):
            first = str(error).strip().partition("\n")[0]
            found.append(Symptom("grad_error", f"{type(error).__name__}: {first}", self._steps + 1))
        for held in self._all():
            if held.steps:
                held.check()
                found += _of_optimizer(held)
        found += self._of_leaves()
        if self._missing_inputs:
            text = f"autograd.grad found no path to an input in {_count(self._missing_inputs, 'call')}"
            found.append(Symptom("none", text))
        kept = max(self._passages.kept, self._passages.kept_now() - 1)
        if kept >= _KEPT:
            found.append(Symptom("live_graphs", f"the graphs of {kept} earlier backwards were still alive"))
        for crumb in self._mode.reads():
            kind = "overwritten" if crumb.slug == "grad_overwritten" else "none"
            found.append(Symptom(kind, f"{crumb.text} ({_where(crumb.place)})", crumb.step))
        for crumb in self._mode.crumbs():
            found.append(Symptom("left_autograd", f"{crumb.text} ({_where(crumb.place)})", crumb.step))
        return found

    def _of_leaves(self) -> list[Symptom]:
        found: list[Symptom] = []
        stepping = any(held.steps for held in self._all())
        nobody = self._passages.trained_by_nobody()
        if stepping and nobody:
            verb = "is" if len(nobody) == 1 else "are"
            text = f"{_count(len(nobody), 'tensor')} with a gradient {verb} in no optimizer"
            shapes = {leaf.shape for leaf in nobody}
            for held in self._all():
                never = [p for position in held.never(frozen=False) if (p := held.params[position]()) is not None]
                if any(tuple(p.shape) in shapes for p in never):
                    found.append(Symptom("replaced", f"an optimizer holds others of the same shapes: {text}"))
            found.append(Symptom("not_in_optimizer", text, None, _named(leaf.name for leaf in nobody)))
        if not stepping:
            for state in ("zero", "nonfinite"):
                such = [leaf for leaf in self._passages.leaves.values() if leaf.state == state]
                if such:
                    words = "exactly zero" if state == "zero" else "not finite"
                    found.append(_about_leaves(state, f"the gradient of {_count(len(such), 'leaf')} is {words}", such))
        return found


def _about_leaves(kind: str, text: str, leaves: list[Leaf]) -> Symptom:
    return Symptom(kind, text, None, _named(leaf.name for leaf in leaves))


def _of_optimizer(held: Held) -> list[Symptom]:
    total = len(held.params)
    found: list[Symptom] = []

    def some(kind: str, positions: Iterable[int], words: str, step: int | None) -> None:
        places = list(positions)
        if places:
            names = _named(held.names[position] for position in places)
            shown = f": {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}" if names else ""
            found.append(Symptom(kind, f"{len(places)} of {_count(total, 'parameter')} {words}{shown}", step, names))

    some("none", held.never(frozen=False), f"got no gradient in {_count(held.steps, 'step')}", None)
    some("frozen", held.never(frozen=True), "are held by an optimizer and frozen", None)
    if held.lost:
        step = min(held.lost.values())
        some("lost", held.lost, f"had a gradient and had none at step {step}", step)
    if held.zero:
        step = min(held.zero.values())
        some("zero", held.zero, f"had a gradient of zero from step {step} on", step)
    if held.bad:
        step = min(held.bad.values())
        some("nonfinite", held.bad, f"had a gradient that is not finite at step {step}", step)
    elif (left := held.left_out + held.pending) >= _LEFT_OUT:
        words = f"had a gradient that is not finite in the last {left} backwards, and the program took no step"
        some("nonfinite", sorted(held.left_bad), words, held.steps + 1)
    if held.uncleared is not None:
        text = f"step {held.uncleared} used gradients that were never cleared"
        found.append(Symptom("uncleared", text, held.uncleared))
    if held.cleared is not None:
        text = f"gradients were cleared between backward() and step {held.cleared}"
        found.append(Symptom("cleared", text, held.cleared))
    if held.shared is not None:
        text = f"two parameters had one tensor as their gradient at step {held.shared}"
        found.append(Symptom("overwritten", text, held.shared))
    return found


def _named(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({name for name in names if name is not None}))


def _where(place: Any) -> str:
    return f"{os.path.basename(place.file)}:{place.line}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {'leaves' if what == 'leaf' else what + 's'}"


_installed: weakref.WeakSet[Sentinel] = weakref.WeakSet()


def _forget_in_child() -> None:
    for sentinel in tuple(_installed):
        sentinel._off = True
        sentinel._may_look = False
        sentinel._close()


# A fork handler cannot be taken back: one for all sentinels of this process.
os.register_at_fork(after_in_child=_forget_in_child)


def _looked_at(step: int) -> bool:
    """Whether lines are looked at in a step, from 1: in the first ones, then in every 8th, 64th, 512th.

    A fault that begins late and lasts is met before long, and the share of the cost stays what it is.
    """
    every = next((every for until, every in _EVERY if step <= until), _SELDOM)
    return step <= DENSE or step % every == 0
