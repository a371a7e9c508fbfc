"""A script's own steps, fitted as they come: no step can be called, so each of its steps is used for one thing.

Until the second step has ended every model runs while it keeps as little as it can, since the plain step may not fit.
The third step is profiled; those after it are measured under the plan.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module

from gradctl import _taps
from gradctl._errors import BudgetTooSmall, PlanMismatch, UsageError
from gradctl._fit._api import LEVERS, Corrections, Lever, Planner, measuring
from gradctl._fit._plan import Plan
from gradctl._fit._profile import Profile, device_of, forward_of, profiling
from gradctl._fit._segments import cutting, segment_modules
from gradctl._policy import parse_size
from gradctl._recompute import Recording, Tape, Verify, dispatches, outer_hooks

_LEAN_STEPS: Final = 2
_WRAPPERS: Final = ("torch.nn.parallel", "torch.distributed", "torch._dynamo")


class ScriptFit:
    """Fits the model of a script while its loop runs.

    Args:
        memory: the budget.
        on_done: called when the plan is there, or when none can be; the script may go on.
        levers: see `fit`.
        verify: see `fit`.
        time_limit: seconds for solving.

    Attributes:
        plan: the plan, once it has been measured.
        refused: why there is none.
        steps: optimizer steps so far.
        remarks: what a reader must know besides.
        faults: errors of our own.
    """

    def __init__(
        self,
        memory: str | int | float,
        on_done: Callable[[], None],
        *,
        levers: Sequence[Lever] = LEVERS,
        verify: Verify = "full",
        time_limit: float = 5.0,
    ) -> None:
        self.budget = parse_size(memory)
        self.plan: Plan | None = None
        self.refused: BudgetTooSmall | UsageError | None = None
        self.steps = 0
        self.model: Module | None = None
        self.remarks: list[str] = []
        self.faults: list[str] = []
        self._on_done = on_done
        self._levers = levers
        self._verify: Verify = verify
        self._time_limit = time_limit
        self._optimizer: Any = None
        self._thread = 0
        self._models: dict[Module, int] = {}
        self._inside = threading.local()
        self._running = contextlib.ExitStack()
        self._profile: Profile | None = None
        self._measured: list[int] = []
        self._trial: Plan | None = None
        self._corrections: Corrections | None = None
        self._handles: list[Any] = []

    def start(self) -> None:
        """Begin to listen."""
        self._handles = [
            _taps.optimizer_step.subscribe(after=self._stepped, order="record"),
            _taps.module_called.subscribe(self._around_call, order="record"),
        ]

    def stop(self) -> None:
        """Take everything back, the plan too."""
        while self._handles:
            self._handles.pop().remove()
        self._running.close()
        if self._trial is not None:
            self._trial.undo()

    # -- which module is the model ------------------------------------------------------------------------------------

    def _around_call(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Module, *args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "model", False) or not _may_be_model(module):
                return inner(module, *args, **kwargs)
            self._inside.model = True
            try:
                return self._leanly(inner, module, args, kwargs)
            finally:
                self._inside.model = False

        return call

    def _leanly(self, inner: Callable[..., Any], module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = module.forward
        saved = 0

        def lean(*args: Any, **kwargs: Any) -> Any:
            nonlocal saved
            tape = Tape(verify="off", outer=outer_hooks())
            with (
                cutting(segment_modules(module), lambda _: tape.cut()),
                torch.autograd.graph.saved_tensors_hooks(tape.pack, tape.unpack),
                Recording(tape),
            ):
                out = forward(*args, **kwargs)
            saved = sum(version.nbytes for version in tape.dropped)
            tape.finish()
            return out

        with forward_of(module, lean):
            out = inner(module, *args, **kwargs)
        self._models[module] = self._models.get(module, 0) + saved
        return out

    # -- from step to step --------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._optimizer is None:
            self._optimizer, self._thread = optimizer, threading.get_ident()
        if optimizer is not self._optimizer or threading.get_ident() != self._thread:
            return
        self.steps += 1
        try:
            if self.steps == 1:
                self._models.clear()
            elif self.steps == _LEAN_STEPS:
                self._begin_profile()
            elif self._profile is not None:
                self._planned(self._profile)
            elif self._trial is not None:
                self._judged(self._trial)
        except (BudgetTooSmall, UsageError) as refused:
            self.refused = refused
        except Exception as fault:
            self.faults.append(f"{type(fault).__name__}: {fault}")
        if self.plan is not None or self.refused is not None or self.faults:
            self._handles.pop(0).remove()
            self._on_done()

    def _begin_profile(self) -> None:
        self._handles.pop().remove()
        if not self._models:
            raise UsageError(
                "no module was called with gradients on between two optimizer steps",
                what="what is fitted is the forward of a module that holds parameters",
                fix="call the model (model(x)), not a method of it, and outside of no_grad",
            )
        self.model = model = max(self._models, key=lambda module: self._models[module])
        others = len(self._models) - 1
        if others:
            self.remarks.append(
                f"{others} more module{'s are' if others > 1 else ' is'} called in a step; what is saved there stays"
            )
        self._models.clear()
        self._profile = self._running.enter_context(
            profiling(model, segment_modules(model), self._known, head="head" in self._levers)
        )

    def _planned(self, seen: Profile) -> None:
        self._profile = None
        self._running.close()
        assert self.model is not None
        if not seen.calls:
            raise UsageError(
                f"{type(self.model).__name__} was not called in the third step",
                why="the steps of this script are not alike",
                fix="call gradctl.fit(model, step, memory=...) in the script, with a step that is typical",
            )
        planner = Planner(self.model, seen, self._levers, self._verify, self._time_limit)
        self._try(planner.plan(self.budget))
        assert self._trial is not None
        self._corrections = Corrections(planner, self._trial)

    def _try(self, plan: Plan) -> None:
        assert self.model is not None
        self._trial = plan.apply(self.model)
        self._measured = self._running.enter_context(measuring(self._known, device_of(self.model)))

    def _judged(self, plan: Plan) -> None:
        self._running.close()
        assert self._corrections is not None
        better = self._corrections.after(plan, self._measured[0])
        if better is None:
            self.plan = plan
            return
        plan.undo()
        self._try(better)

    def _known(self) -> list[Tensor]:
        assert self.model is not None
        return alive(device_of(self.model))


class ScriptPlan:
    """Applies a plan to the first module of a script that it fits, and measures one step under it.

    Args:
        plan: what to apply.
        tell: called once with what became of it: the class of the model, and the peak that was measured or None.

    Attributes:
        nearest: why the module with the most parameters is not the plan's model, as long as none is.
    """

    def __init__(self, plan: Plan, tell: Callable[[str, int | None], None]) -> None:
        self.plan = plan
        self.nearest: PlanMismatch | None = None
        self._tell = tell
        self._most = 0
        self._tried: weakref.WeakSet[Module] = weakref.WeakSet()
        self._model: Module | None = None
        self._optimizer: Any = None
        self._thread = 0
        self._steps = 0
        self._running = contextlib.ExitStack()
        self._measured: list[int] = []
        self._handles: list[Any] = []

    def start(self) -> None:
        """Begin to look for the model."""
        self._handles = [_taps.module_called.subscribe(self._around_call, order="record")]

    @property
    def applied(self) -> bool:
        """Whether the model was found."""
        return self._model is not None

    def stop(self) -> None:
        """Stop listening; the plan stays with the model."""
        while self._handles:
            self._handles.pop().remove()
        self._running.close()
        if self._model is not None and self._tell is not _nobody:
            self._told(None)

    def drop(self) -> None:
        """In a forked child: stop, and tell nobody."""
        self._tell = _nobody
        while self._handles:
            self._handles.pop().remove()

    def _around_call(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Module, *args: Any, **kwargs: Any) -> Any:
            if self._model is None and module not in self._tried and _may_be_model(module):
                self._tried.add(module)
                self._try(module)
            return inner(module, *args, **kwargs)

        return call

    def _try(self, module: Module) -> None:
        try:
            self.plan.apply(module)
        except PlanMismatch as mismatch:
            count = sum(p.numel() for p in module.parameters())
            if count > self._most:
                self._most, self.nearest = count, mismatch
            return
        self._model = module
        self._handles.pop().remove()
        self._handles = [_taps.optimizer_step.subscribe(after=self._stepped, order="record")]

    def _stepped(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._optimizer is None:
            self._optimizer, self._thread = optimizer, threading.get_ident()
        if optimizer is not self._optimizer or threading.get_ident() != self._thread:
            return
        self._steps += 1
        assert self._model is not None
        device = device_of(self._model)
        if self._steps == _LEAN_STEPS:
            self._measured = self._running.enter_context(measuring(lambda: alive(device), device))
        elif self._steps > _LEAN_STEPS:
            self._running.close()
            self._handles.pop().remove()
            self._told(self._measured[0])

    def _told(self, peak: int | None) -> None:
        tell, self._tell = self._tell, _nobody
        tell(type(self._model).__name__, peak)


def _nobody(*_: Any) -> None:
    """Tell nobody."""


def _may_be_model(module: Module) -> bool:
    """Whether this call may be that of the model: with gradients on, of a module with weights that is no wrapper."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not type(module).__module__.startswith(_WRAPPERS)
        and any(p.requires_grad for p in module.parameters())
    )


def alive(device: torch.device) -> list[Tensor]:
    """Return every tensor that Python knows on a device, and their gradients."""
    found: list[Tensor] = []
    for one in gc.get_objects():
        if not issubclass(type(one), Tensor) or dispatches(one):
            continue
        tensor: Tensor = one
        if tensor.device != device or tensor.layout is not torch.strided:
            continue
        found.append(tensor)
        if tensor.is_leaf and tensor.grad is not None and tensor.grad.layout is torch.strided:
            found.append(tensor.grad)
    return found
