"""`unfreeze_by_step`: freezes that are let go one after the other, counted by the optimizer's steps."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from gradctl import _taps
from gradctl._errors import FreezeRefused, UsageError
from gradctl._freeze import _refusals, _watch
from gradctl._freeze._handle import DropoutMode, Freeze, Request
from gradctl._freeze._layers import Layer
from gradctl._names._patterns import Pattern, named_parameters, other_names, select, unwrapped


class UnfreezeSchedule:
    """What begins to train at which step; see `gradctl.unfreeze_by_step`.

    Attributes:
        step: how many steps the optimizer has taken since it was attached, or since the step that was loaded.
    """

    def __init__(
        self,
        steps: Mapping[tuple[Pattern, ...], int],
        *,
        rest: Literal["frozen", "keep"],
        norm_stats: bool,
        dropout: DropoutMode,
        place: str,
    ) -> None:
        self._steps = dict(steps)
        self._rest = rest
        self._options: dict[str, Any] = {"norm_stats": norm_stats, "dropout": dropout}
        self._place = place
        self._step = 0
        self._skips: list[Tensor] = []
        self._model: Module | None = None
        self._begins: dict[str, int | None] = {}
        self._held: dict[int | None, Freeze] = {}
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._is_checked = False
        self._counter: Any = None

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        self._settle()
        return self._step

    def attach(self, model: Module, optimizer: torch.optim.Optimizer | None = None) -> UnfreezeSchedule:
        """Freeze what does not train yet, and follow the steps from here on.

        Args:
            model: where the names are from.
            optimizer: whose steps count; None: the first that steps and holds a parameter of the model.

        Returns:
            This schedule; `with schedule.attach(...)` removes it at the end of the block.

        Raises:
            FreezeRefused: nothing trains at step 0, or as `freeze` and `unfreeze`; nothing was changed.
            PatternMatchesNothing: a pattern names nothing.
            UsageError: it is attached already, or a pattern begins later than all that it names.
        """
        _refusals.refuse_no_model(model, "unfreeze_by_step")
        if self._model is not None:
            raise UsageError("this schedule is attached already", fix="schedule.remove() first, or make another")
        named = named_parameters(unwrapped(model))
        begins = self._read(named)
        inner: Any = None
        if optimizer is not None:
            (inner,) = _refusals.optimizers_of(optimizer)
            self._refuse_unheld(named, begins, inner)
            _refusals.refuse_lbfgs([inner])
            self._optimizer = weakref.ref(inner)
        self._model, self._begins, self._is_checked = model, begins, False
        try:
            self._turn()
        except BaseException:
            self.remove()
            raise
        # The optimizer holds the schedule, which holds the model: nobody needs to keep it, and nothing outlives them.
        if inner is not None:
            self._counter = inner.register_step_post_hook(self._stepped)
        else:
            self._counter = _FirstStep(self)
        return self

    def remove(self) -> None:
        """Let everything go that it holds, and count no longer; a second call does nothing."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.remove()
        for key in list(self._held):
            self._held.pop(key).remove()
        self._model, self._optimizer = None, None
        _watch.renew()

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run needs: `{"step": n}`."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a step, attached or not: what trains is what trained there.

        Raises:
            UsageError: it is not what `state_dict` returned.
        """
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise UsageError(f"state {dict(state)!r}"[:200], what='{"step": n} is needed, a whole number from 0 on')
        self._step, self._skips = step, []
        if self._model is not None:
            self._turn()

    def __enter__(self) -> UnfreezeSchedule:
        if self._model is None:
            raise UsageError(
                "this schedule is not attached", fix="with schedule.attach(model, optimizer): ..., or give model="
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        lines = [f"unfreeze_by_step at {self._place}, step {self.step}" + ("" if self._model else ", not attached")]
        for patterns, begin in sorted(self._steps.items(), key=lambda entry: entry[1]):
            state = "trains" if begin <= self._step else "frozen"
            lines.append(f"  from step {begin:>6}  {_shown(patterns):<40} {state if self._model else ''}".rstrip())
        lines.append(f"  the rest          {'stays frozen' if self._rest == 'frozen' else 'keeps its flags'}")
        return "\n".join(lines)

    def _read(self, named: Mapping[str, Parameter]) -> dict[str, int | None]:
        """Return the step at which each parameter begins; None: never. Without those whose flags are kept."""
        begins: dict[str, int | None] = dict.fromkeys(named) if self._rest == "frozen" else {}
        first: dict[int, tuple[int, tuple[Pattern, ...]]] = {}
        for patterns, begin in sorted(self._steps.items(), key=lambda entry: entry[1]):
            chosen = select(named, patterns)
            new = [name for name, parameter in chosen.items() if id(parameter) not in first]
            if not new:
                earlier = first[id(next(iter(chosen.values())))] if chosen else (begin, patterns)
                raise UsageError(
                    f"{_shown(patterns)}: {begin} unfreezes nothing",
                    what=f"all that it names begins at step {earlier[0]} already, by {_shown(earlier[1])}",
                    fix=f'take it out of the earlier one: ({_shown(earlier[1])}, "!{_plain(patterns)}")',
                )
            _refusals.refuse_half_of_a_tie(named, chosen, "unfreeze")
            _refusals.refuse_what_cannot_train({name: named[name] for name in new})
            for name in new:
                begins[name] = begin
            first.update((id(named[name]), (begin, patterns)) for name in new)
        for name, others in other_names(named).items():
            for other in others:
                if begins.get(name) != begins.get(other):
                    raise AssertionError(f"{name} and {other} are one tensor")
        return begins

    def _turn(self) -> None:
        """Hold what does not train at this step, and nothing else."""
        assert self._model is not None
        named = named_parameters(unwrapped(self._model))
        waiting = {begin for begin in self._begins.values() if begin is None or begin > self._step}
        trains = any(begin is not None and begin <= self._step for begin in self._begins.values())
        if not trains and not any(named[name].requires_grad for name in named.keys() - self._begins.keys()):
            raise self._nothing_trains()
        for key in sorted(self._held, key=_latest_first, reverse=True):
            if key not in waiting:
                self._held.pop(key).remove()
        if waiting == self._held.keys():
            return
        for key in list(self._held):  # a step back: all anew, since each lies over those that are let go after it
            self._held.pop(key).remove()
        for key in sorted(waiting, key=_latest_first):
            names = {name for name, begin in self._begins.items() if begin == key}
            until = "throughout" if key is None else f"until step {key}"
            layer = Layer(f"unfreeze_by_step, {until}", self._place)
            chosen: tuple[Pattern, ...] = (lambda name, value, names=names: name in names,)
            request = Request(self._model, chosen, layer, trains=False, nothing_left="allow", **self._options)
            self._held[key] = Freeze(request)

    def _nothing_trains(self) -> FreezeRefused:
        begin = min(step for step in self._begins.values() if step is not None)
        return FreezeRefused(
            f"nothing trains before step {begin}",
            what=f"the earliest of {len(self._steps)} patterns begins at step {begin}, and there is no step without it",
            fix='let something begin at step 0: {"head": 0, ...}',
        )

    def _stepped(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._model is None:
            return
        if not self._is_checked:
            # Now and not at the step that would go wrong, hours later.
            named = named_parameters(unwrapped(self._model))
            later = {name: named[name] for name, begin in self._begins.items() if begin and name in named}
            _refusals.refuse_under_ddp(unwrapped(self._model), later, "unfreeze")
            self._refuse_unheld(named, self._begins, optimizer)
            self._is_checked = True
        self._step += 1
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):  # a fused step under a scaler decides on the device whether it is one
            self._skips.append(found_inf.detach().clone())
        if any(begin is not None and begin <= self._step for begin in self._held):
            self._settle()
            self._turn()

    def _settle(self) -> None:
        """Take back the steps that were none; waits for the device, so it is done where the count matters."""
        if self._skips:
            skips, self._skips = self._skips, []
            self._step -= int(torch.stack([skip.reshape(()).to(skips[0].device) for skip in skips]).ne(0).sum())

    @staticmethod
    def _refuse_unheld(
        named: Mapping[str, Parameter], begins: Mapping[str, int | None], optimizer: torch.optim.Optimizer
    ) -> None:
        trains = {name: named[name] for name, begin in begins.items() if begin is not None}
        _refusals.refuse_not_in_optimizer(trains, [optimizer], "they would get gradients and never move")


class _FirstStep:
    """Waits for the first step of an optimizer that holds a parameter of the model, then counts that optimizer's.

    Args:
        schedule: held until then.
    """

    def __init__(self, schedule: UnfreezeSchedule) -> None:
        self._schedule: UnfreezeSchedule | None = schedule
        self._counter: Any = None
        # Stays to the end, and passes: torch goes through these hooks while we are called.
        self._handle = _taps.optimizer_step.subscribe(after=self._stepped, order="veto")
        weakref.finalize(schedule, self._handle.remove).atexit = False

    def remove(self) -> None:
        """Wait and count no longer."""
        self._schedule = None
        self._handle.remove()
        if self._counter is not None:
            self._counter.remove()

    def _stepped(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        schedule = self._schedule
        if schedule is None or schedule._model is None:
            return
        ids = {id(parameter) for parameter in schedule._model.parameters()}
        if any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"]):
            self._schedule = None
            schedule._optimizer = weakref.ref(optimizer)
            self._counter = optimizer.register_step_post_hook(schedule._stepped)
            schedule._stepped(optimizer, args, kwargs)


def schedule_from(
    steps: Any,
    *,
    rest: Literal["frozen", "keep"],
    norm_stats: bool,
    dropout: DropoutMode,
    place: str,
) -> UnfreezeSchedule:
    """Read the dictionary.

    Raises:
        UsageError: it is none, it is empty, or a step is no whole number from 0 on.
    """
    if not isinstance(steps, Mapping) or not steps:
        raise UsageError(
            f"unfreeze_by_step({steps!r})"[:200],
            what="a dictionary from patterns to steps is needed",
            fix='for example {"head": 0, "encoder.layer.11.*": 500}',
        )
    _refusals.refuse_other_than("rest", rest, ("frozen", "keep"))
    _refusals.refuse_other_than("dropout", dropout, ("keep", "off"))
    for patterns, begin in steps.items():
        if type(begin) is not int or begin < 0:
            raise UsageError(
                f"{_shown(patterns)}: {begin!r}", what="the step at which it begins is a whole number from 0 on"
            )
    read = {patterns if isinstance(patterns, tuple) else (patterns,): begin for patterns, begin in steps.items()}
    return UnfreezeSchedule(read, rest=rest, norm_stats=norm_stats, dropout=dropout, place=place)


def _latest_first(begin: int | None) -> float:
    return float("-inf") if begin is None else -begin


def _shown(patterns: Any) -> str:
    several = patterns if isinstance(patterns, tuple) else (patterns,)
    return ", ".join(
        repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", type(pattern).__name__)
        for pattern in several
    )


def _plain(patterns: tuple[Pattern, ...]) -> str:
    return patterns[0] if isinstance(patterns[0], str) else "..."
