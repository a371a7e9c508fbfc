"""A traced stretch of a program: names and facts as it runs, judged at its end or as soon as they suffice."""

from __future__ import annotations

import gc
import os
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradctl._errors import UsageError
from gradctl._explain._context import Context
from gradctl._explain._rank import diagnose
from gradctl._explain._symptoms import HARMLESS, explained
from gradctl._lineage import Trace, Tracer
from gradctl._lineage._steps import before_step
from gradctl._names import NameBook
from gradctl._results import Finding

_FEWEST = 3
_SETTLE = 3
_HARMLESS_AFTER = 20
_NAME_STEPS = 5

_current: Tracing | None = None


class Tracing:
    """A trace of this process with its judgement; one at a time.

    Nothing that goes wrong in here reaches the program: tracing stops, and `faults` says why.

    Args:
        into: installed packages that count as the user's code.
        script: the file that runs.
        steps: be done after so many optimizer steps.
        at_step: the step that matters, counted from 1 for each optimizer; numbers are looked at from shortly before
            it on, and nothing is concluded before it.
        notes: show harmless breaks too.
        symptoms: what is to be explained, each with `kind`, `text`, `step` and `parameters`.
        on_done: called from within an optimizer step when `steps` is reached, or when the symptoms are explained and
            further steps change nothing.
        gives_way: where given, a trace that the program begins itself ends this one, and this is called.

    Attributes:
        faults: why the tracer switched itself off, if it did.
    """

    def __init__(
        self,
        *,
        into: Sequence[str] = (),
        script: str | None = None,
        steps: int | None = None,
        at_step: int | None = None,
        notes: bool = False,
        symptoms: Sequence[Mapping[str, Any]] = (),
        on_done: Callable[[], None] | None = None,
        gives_way: Callable[[], None] | None = None,
    ) -> None:
        self._gives_way = gives_way
        self._limit = steps
        self._at_step = at_step
        self._notes = notes
        self._symptoms = [dict(symptom) for symptom in symptoms]
        self._on_done = on_done
        self._own_faults: list[str] = []
        self._judged: dict[int, frozenset[Any]] = {}
        self._next_look = _FEWEST
        self._named = 0
        self._asked = 0
        self._older: list[weakref.ref[Optimizer]] = []
        self._done = False
        self._found: list[Finding] | None = None
        self._trace = Trace(into=into, script=script, on_step=self._stepped)
        folder = os.path.dirname(os.path.abspath(script)) if script is not None else os.getcwd()
        self._context = Context(self._trace.tracer, folder=folder, book=NameBook())
        self._running = False

    @property
    def faults(self) -> list[str]:
        """Why the tracer switched itself off, and what else failed in gradctl."""
        return [*self._trace.tracer.faults, *self._own_faults]

    @property
    def steps(self) -> int:
        """Number of steps of the optimizer that has made most of them."""
        return max((o.steps for o in self._trace.tracer.facts.optimizers.values()), default=0)

    @property
    def done(self) -> bool:
        """Whether `steps` was reached or the symptoms are explained."""
        return self._done

    def start(self) -> None:
        """Begin to trace; a second call does nothing.

        Raises:
            UsageError: this process is being traced already.
        """
        global _current
        if self._running:
            return
        if _current is not None and _current._gives_way is not None:
            ousted = _current._gives_way
            _current.stop()
            ousted()
        if _current is not None:
            raise UsageError(
                "this process is being traced already",
                why="gradctl.explain, gradctl.watch and `gradctl explain` trace one at a time",
                fix="end the first trace before the next one begins",
            )
        _current = self
        self._running = True
        if self._limit is not None:
            self._older = [weakref.ref(o) for o in _optimizers()]
        if self._at_step is not None:
            self._trace.tracer.numerics = self._at_step <= _SETTLE
        try:
            self._context.book.start()
            self._trace.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Put everything back and forget the program; a second call does nothing. What was found stays."""
        global _current
        if _current is self:
            _current = None
        self._running = False
        self._trace.stop()
        self._context.book.stop()

    def findings(self, error: BaseException | None = None) -> list[Finding]:
        """Return what the facts so far show, most certain first.

        Args:
            error: what ended the program, or None.
        """
        if self._running:
            self._context.error = error
            self._context.finished = error is None and not self._done
            self._found = self._judge()
        return list(self._found or ())

    def name(self, tensors: Mapping[int, str]) -> None:
        """Give leaves their names, by id, where the caller knows them."""
        self._context._names.update(tensors)

    def ask(self, optimizer: Any) -> None:
        """Look at the gradients of what an optimizer holds as if it were about to step, unless it has made steps.

        Args:
            optimizer: it.
        """
        tracer = self._trace.tracer
        known = tracer.facts.optimizers.get(id(optimizer))
        if tracer.disabled or (known is not None and known.ref() is optimizer and known.steps > self._asked):
            return
        self._asked += 1
        with torch._C.DisableTorchFunction():
            before_step(tracer, optimizer, tracer.frames.stack())

    def ask_leaves(self, leaves: Sequence[Tensor]) -> None:
        """Note why leaves have no gradient, for those that no optimizer was asked for.

        Args:
            leaves: the parameters of a model.
        """
        tracer = self._trace.tracer
        if tracer.disabled:
            return
        held = self._context.held()
        with torch._C.DisableTorchFunction():
            for leaf in leaves:
                if leaf.requires_grad and leaf.grad is None and id(leaf) not in held:
                    tracer.explain_now(leaf)

    @property
    def context(self) -> Context:
        """The facts, and who is who in them."""
        return self._context

    def _judge(self) -> list[Finding]:
        try:
            self._name_held()
            return diagnose(self._context, notes=self._notes)
        except Exception as fault:
            self._note(fault)
            return list(self._found or ())

    def _note(self, fault: BaseException) -> None:
        where = traceback.extract_tb(fault.__traceback__)[-1]
        if len(self._own_faults) < 10:
            self._own_faults.append(
                f"{type(fault).__name__}: {fault} ({os.path.basename(where.filename)}:{where.lineno})"
            )

    # ---------------------------------------------------------------------------------------------- while it runs

    def _stepped(self, tracer: Tracer) -> None:
        try:
            done = self._look()
        except Exception as fault:
            self._note(fault)
            return
        if done:
            self._done = True
            if self._on_done is not None:
                self._on_done()

    def _look(self) -> bool:
        """Look up names, and say whether there is nothing more to learn."""
        if self._done or not self._running:
            return False
        steps = self.steps
        if steps <= _NAME_STEPS:
            self._name_held()
        if self._at_step is not None and steps + _SETTLE >= self._at_step:
            self._trace.tracer.numerics = True
        if self._limit is not None:
            return self._reached(self._limit)
        if not self._symptoms or self._on_done is None or steps < max(self._next_look, self._earliest()):
            return False
        # Judging costs milliseconds: look again after a tenth of the steps made, and never two steps in a row.
        self._next_look = steps + max(_SETTLE, steps // 10)
        self._context.finished = False
        findings = self._judge()
        key = frozenset((f.slug, f.primary, f.parameters) for f in findings)
        before = [seen for step, seen in self._judged.items() if step <= steps - _SETTLE]
        settled = bool(before) and before[-1] == key
        self._judged[steps] = key
        self._found = findings
        wanted = [symptom for symptom in self._symptoms if symptom["kind"] not in HARMLESS]
        if wanted:
            return settled and all(explained(symptom, findings) for symptom in wanted)
        # When nothing is missing for what was seen by now, it was meant.
        return settled and steps >= self._earliest() + _HARMLESS_AFTER

    def _earliest(self) -> int:
        begun = [symptom["step"] for symptom in self._symptoms if symptom.get("step")]
        return max([_FEWEST, *(step + _SETTLE for step in begun), (self._at_step or 0) + _SETTLE])

    def _reached(self, limit: int) -> bool:
        made = {id(o.ref()): o.steps for o in self._trace.tracer.facts.optimizers.values() if o.ref() is not None}
        others = any(o is not None and id(o) not in made for o in (ref() for ref in self._older))
        # All optimizers shall make so many steps; one that makes more shows that another may never do.
        return bool(made) and (max(made.values()) > limit or (min(made.values()) >= limit and not others))

    def _name_held(self) -> None:
        """Look for names while the functions that hold the models are still running."""
        held = set(self._context.held())
        if self._named != len(held):
            self._named = len(held)
            self._context.name_all(held)


def _optimizers() -> list[Optimizer]:
    """Return the optimizers of this process, without those that only pass on to another one."""
    found = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    return [o for o in found if not any(issubclass(type(value), Optimizer) for value in vars(o).values())]
