"""`gradctl.fit`: measure a step, choose, apply, and look whether the budget holds."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradctl._errors import BudgetTooSmall, UsageError
from gradctl._fit._allocator import Allocated, name_of
from gradctl._fit._layout import Layout
from gradctl._fit._ledger import Ledger
from gradctl._fit._plan import Plan, Region, in_words, parameters_of
from gradctl._fit._profile import OTHER, Profile, device_of, profile
from gradctl._fit._segments import segment_modules
from gradctl._fit._solve import Chosen, Costs, Frontiers, choose, frontiers, has_solver, least
from gradctl._policy import parse_size
from gradctl._recompute import Codec, RegionPlan, Verify

Lever = Literal["pack", "replay", "head"]
LEVERS: Final[tuple[Lever, ...]] = ("pack", "replay", "head")
_CORRECTIONS: Final = 3
_FEWEST_SEGMENTS: Final = 2
_USED: Final = 0.97
"""Below this share of the budget a plan is asked to keep more."""
_CURVE: Final = 6


def fit(
    model: Module,
    step: Callable[[], Tensor],
    *,
    memory: str | int | float,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    time_limit: float = 5.0,
    levers: Sequence[Lever] = LEVERS,
    verify: Verify = "full",
    prove_steps: int = 0,
) -> Plan:
    """Choose what backward remembers so that one training step stays within a byte budget, and put it to work.

    The step is run while it keeps as little as it can, so that a model that does not fit can be measured. What its
    forward computes is then a graph of operations with bytes and times; integer programs choose what to keep, what to
    pack and what to make again, for the least time. The choice is applied to the model and a step is measured under it;
    if that is above the budget it is chosen anew. Gradients and buffers stay bitwise those of the plain step. Model,
    optimizers and random state are left as they were found: a copy of them is held meanwhile.

    Args:
        model: the model; its `forward` is wrapped until `plan.undo()`.
        step: runs one whole training step (forward, backward and, if it is there, the optimizer's step) and returns the
            loss, shape []. It is run two or three times, and must not rely on running once.
        memory: the budget in bytes on the model's device ("8GiB", "512MiB", a number): the peak of what is allocated
            over the step, with weights, gradients, optimizer state and inputs.
        optimizer: the optimizer or optimizers that `step` uses; found by itself where it holds the model's parameters.
        time_limit: seconds for solving.
        levers: what may be done: "pack" (masks as bits, pooling indices as int16), "replay" (make results again),
            "head" (write the gradient of a cross-entropy over the one that came in, on the CPU).
        verify: what of a dropped result is compared with what is made again: "full", "sample" or "off".
        prove_steps: compare the gradients of so many steps with those of the plain model, bitwise, before the plan is
            kept. The plain step must fit for that.

    Returns:
        The plan, applied.

    Raises:
        BudgetTooSmall: no choice stays within the budget; `.smallest` is the smallest budget that works.
        UsageError: the budget is no size, the step returns no loss, or the model is never called in it.
    """
    budget = parse_size(memory)
    if budget <= 0:
        raise UsageError(f"memory={memory!r} is no budget", what="a budget is above zero", fix='memory="8GiB"')
    for lever in levers:
        if lever not in LEVERS:
            raise UsageError(f"{lever!r} is no lever", what=f"levers are {', '.join(LEVERS)}", fix="leave it out")
    optimizers = _optimizers(model, optimizer)

    def known() -> list[Tensor]:
        return _known(model, optimizers)

    with restored(model, optimizers):
        seen = profile(model, step, segment_modules(model), known, head="head" in levers)
    _check(seen, model)
    planner = Planner(model, seen, levers, verify, time_limit)
    plan = planner.plan(budget)
    plan = _measured(model, step, optimizers, known, planner, plan)
    if prove_steps:
        _prove(model, step, optimizers, plan, prove_steps)
    return plan


class Planner:
    """Everything about one profile that does not depend on the budget."""

    def __init__(
        self, model: Module, seen: Profile, levers: Sequence[Lever], verify: Verify, time_limit: float
    ) -> None:
        self.model = model
        self.seen = seen
        self.verify: Verify = verify
        self.levers: tuple[str, ...] = ("head",) if seen.spared else ()
        self.standing = seen.ledger.standing()
        begin = time.perf_counter()
        self.candidates: list[tuple[Layout, Frontiers]] = []
        merge = 1
        while True:
            layout = Layout(seen, merge)
            self.candidates.append((layout, frontiers(layout, Costs(), pack="pack" in levers)))
            pieces = max(len(call.cuts) for call in seen.calls) / merge
            if pieces <= _FEWEST_SEGMENTS or time.perf_counter() - begin > time_limit / 2:
                break
            merge *= 2
        if "replay" not in levers:
            self.candidates = [
                (layout, [(s, [o for o in options if not o.run] or options[-1:]) for s, options in found])
                for layout, found in self.candidates[:1]
            ]
        layout, (chosen, self.smallest) = min(
            ((layout, least(layout, found)) for layout, found in self.candidates), key=lambda pair: pair[1][1]
        )
        self.least = layout, chosen
        first, options = self.candidates[0]
        self.plain_peak = first.peaks([(segment, choice[-1]) for segment, choice in options])[0]
        self.seconds = sum(seen.ledger.seconds.get(key, 0.0) for key in seen.ledger.seconds if key != "again")

    def plan(self, budget: int, *, aim: int | None = None) -> Plan:
        """Return the plan for a budget; `aim` is what is solved for, where that is lower."""
        above = (budget if aim is None else aim) - self.standing
        if above >= self.plain_peak + self.seen.spared:
            return self._made(budget, self.plain_peak + self.seen.spared, None, [], levers=())
        best: tuple[float, Layout, Chosen] | None = None
        for layout, found in self.candidates:
            chosen = choose(layout, found, above)
            if chosen is not None:
                seconds = sum(option.seconds for _, option in chosen)
                if best is None or seconds < best[0]:
                    best = seconds, layout, chosen
        if best is None:
            raise self.too_small(budget, self.smallest_budget)
        _, layout, chosen = best
        return self._made(budget, layout.peaks(chosen)[0], layout, chosen)

    @property
    def smallest_budget(self) -> int:
        """The smallest budget that a plan is expected to meet."""
        return self.smallest + self.standing

    def leanest(self, budget: int) -> Plan:
        """Return the plan that is expected to need least."""
        layout, chosen = self.least
        return self._made(budget, self.smallest, layout, chosen)

    def too_small(self, budget: int, smallest: int) -> BudgetTooSmall:
        """Return the error that says what the smallest budget is."""
        error = BudgetTooSmall(
            f"no plan stays within {in_words(budget)}",
            what=f"the smallest budget that works is {in_words(smallest)} ({smallest} bytes); "
            f"{in_words(self.standing)} of it are weights, gradients, optimizer state and inputs",
            why="what is left is needed at one moment, whatever is made again",
            fix=f"memory={smallest}, or a smaller batch",
        )
        error.smallest = smallest
        return error

    def _made(
        self, budget: int, peak: int, layout: Layout | None, chosen: Chosen, *, levers: tuple[str, ...] | None = None
    ) -> Plan:
        calls: dict[str, RegionPlan] = {}
        for call in self.seen.calls:
            own = [(s, o) for s, o in chosen if s.call is call]
            if call.kind in calls:
                continue
            pack: dict[tuple[int, int], Codec] = {
                segment.contents[key].maker: codec for segment, option in own for key, (codec, _) in option.pack.items()
            }
            calls[call.kind] = RegionPlan(
                functions=call.functions,
                note=frozenset(at for _, option in own for at in option.run),
                drop=frozenset(
                    segment.contents[key].maker
                    for segment, option in own
                    for key in segment.saved
                    if key not in option.keep and key not in option.pack
                ),
                pack=pack,
                cuts=layout.starts[call.number][1:] if layout is not None else (),
            )
        extra = sum(option.seconds for _, option in chosen)
        regions = tuple(
            Region(
                segment.name,
                segment.full,
                option.kept_bytes,
                (len(segment.steps), len(option.run)),
                option.seconds,
                "replay" if option.run else "keep",
            )
            for segment, option in chosen
        )
        remarks = () if has_solver() else ("solved without SciPy, by a greedy search: pip install 'gradctl[fit]'",)
        return Plan(
            budget=budget,
            standing=self.standing,
            predicted_peak=peak + self.standing,
            plain_peak=self.plain_peak + self.seen.spared + self.standing,
            predicted_slowdown=1 + extra / max(self.seconds, 1e-9),
            regions=regions,
            frontier=self._frontier() if chosen else (),
            calls=tuple(calls.values()),
            kinds=tuple(calls),
            model=parameters_of(self.model),
            verify=self.verify,
            remarks=remarks,
            levers=self.levers if levers is None else levers,
        )

    def _frontier(self) -> tuple[tuple[int, float], ...]:
        found: list[tuple[int, float]] = []
        for i in range(_CURVE):
            above = self.smallest + (self.plain_peak - self.smallest) * i // (_CURVE - 1)
            for layout, options in self.candidates[:1]:
                chosen = choose(layout, options, above)
                if chosen is not None:
                    seconds = sum(option.seconds for _, option in chosen)
                    found.append((above + self.standing, 1 + seconds / max(self.seconds, 1e-9)))
        return tuple(found)


def _measured(
    model: Module,
    step: Callable[[], Tensor],
    optimizers: list[Optimizer],
    known: Callable[[], list[Tensor]],
    planner: Planner,
    plan: Plan,
) -> Plan:
    """Apply a plan and measure a step under it; where that is above the budget, choose anew for less."""
    corrections = Corrections(planner, plan)
    while True:
        plan.apply(model)
        try:
            with restored(model, optimizers):
                peak = peak_of(step, known, device_of(model))
        except BaseException:
            plan.undo()
            raise
        better = corrections.after(plan, peak)
        if better is None:
            return plan
        plan.undo()
        plan = better


class Corrections:
    """What follows when a step under a plan was measured: the plan holds, or another is tried for less, or for more.

    Args:
        planner: makes plans.
        plan: the first one.
    """

    def __init__(self, planner: Planner, plan: Plan) -> None:
        self._planner = planner
        self._budget = self._aim = plan.budget
        self._left = _CORRECTIONS
        self._lowest: int | None = None
        self._best: Plan | None = None

    def after(self, plan: Plan, peak: int) -> Plan | None:
        """Take a measured peak.

        Returns:
            None if the plan stays, else the one to try next.

        Raises:
            BudgetTooSmall: nothing is left to try; the plan is undone.
        """
        offset = peak - plan.predicted_peak
        object.__setattr__(plan, "measured_peak", peak)
        if peak <= self._budget:
            return self._for_more(plan, peak, offset)
        if self._best is not None:
            self._left = 0
            return self._best  # which has held
        self._lowest = peak if self._lowest is None else min(self._lowest, peak)
        self._aim -= peak - self._budget
        if self._left > 0 and self._aim >= self._planner.smallest_budget:
            self._left -= 1
            return self._corrected(self._planner.plan(self._budget, aim=self._aim), offset)
        if self._left >= 0:
            self._left = -1
            return self._planner.leanest(self._budget)
        plan.undo()
        raise self._planner.too_small(self._budget, self._lowest)

    def _for_more(self, plan: Plan, peak: int, offset: int) -> Plan | None:
        """Return a plan that keeps more, where much of the budget is left."""
        if peak >= _USED * self._budget or plan.drops_nothing or self._left <= 0:
            return None
        self._left = min(self._left, 2) - 1
        self._aim = self._budget - offset
        more = self._planner.plan(self._budget, aim=self._aim)
        if more.calls == plan.calls:
            return None
        self._best = plan
        return self._corrected(more, offset)

    def _corrected(self, plan: Plan, offset: int) -> Plan:
        """Return a plan whose prediction knows by how much that of the last one was wrong."""
        return replace(plan, predicted_peak=plan.predicted_peak + offset)


def peak_of(step: Callable[[], Any], known: Callable[[], list[Tensor]], device: torch.device | None = None) -> int:
    """Run a step and return the most bytes that were alive in it, those that were there before included.

    Args:
        step: runs it.
        known: returns the tensors that are there; a function, because a list of them would keep what the step frees.
        device: where; None for all together.

    Returns:
        The allocator's peak above the beginning, and what the ledger knows to have been there.
    """
    with measuring(known, device) as found:
        step()
    return found[0]


@contextmanager
def measuring(known: Callable[[], list[Tensor]], device: torch.device | None = None) -> Generator[list[int]]:
    """Measure the peak of what runs inside, as `peak_of` does; it is in the list when it is left without an error."""
    ledger = Ledger(device)
    ledger.where = OTHER
    ledger.before(known())
    gc.collect()
    found: list[int] = []
    with Allocated(known()) as seen, ledger:
        yield found
    found.append(ledger.standing() + seen.peak(None if device is None else name_of(device)))


def _prove(model: Module, step: Callable[[], Tensor], optimizers: list[Optimizer], plan: Plan, steps: int) -> None:
    def run() -> list[Tensor]:
        found: list[Tensor] = []
        with restored(model, optimizers):
            for _ in range(steps):
                step()
                found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
                found += [b.clone() for b in model.buffers()]
        return found

    planned = run()
    plan.undo()
    plain = run()
    same = len(planned) == len(plain) and all(map(_bitwise, planned, plain))
    if not same:
        raise UsageError(
            "the plan does not give the plain step's gradients",
            what="a gradient or buffer differs in its bits; the plan was undone",
            why="the step itself may differ from run to run: run it twice without a plan and compare",
            fix="make the step deterministic (seeds, torch.use_deterministic_algorithms), or report it",
        )
    plan.apply(model)


def _bitwise(one: Tensor, other: Tensor) -> bool:
    return (one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))) or _same_nan(
        one, other
    )


def _same_nan(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


def _check(seen: Profile, model: Module) -> None:
    if not isinstance(seen.loss, Tensor) or seen.loss.numel() != 1:
        raise UsageError(
            f"the step returned {type(seen.loss).__name__}, not a loss",
            what="fit() needs the loss, a tensor of one number, to know that the step was one",
            fix="return loss at the end of the step",
        )
    if not seen.calls:
        raise UsageError(
            f"the step never called this {type(model).__name__} with gradients on",
            why="what is fitted is the model's forward",
            fix="pass the model that the step trains, and run its forward outside of no_grad",
        )


def _optimizers(model: Module, given: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if given is not None:
        return [given] if isinstance(given, Optimizer) else list(given)
    params = {id(p) for p in model.parameters()}
    return [
        found
        for found in gc.get_objects()
        if issubclass(type(found), Optimizer) and any(id(p) in params for g in found.param_groups for p in g["params"])
    ]


def _known(model: Module, optimizers: list[Optimizer]) -> list[Tensor]:
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    for optimizer in optimizers:
        found += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return found


@contextmanager
def restored(model: Module, optimizers: list[Optimizer]) -> Generator[None]:
    """Give parameters, buffers, gradients, optimizer state and random state back as they were, whatever happens."""
    tensors = [*model.parameters(), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    # Weakly: a step that clears gradients frees them, and is measured as it is.
    grads = [
        (p, None if p.grad is None else weakref.ref(p.grad), None if p.grad is None else p.grad.detach().clone())
        for p in model.parameters()
    ]
    states = [
        {
            p: {k: (v, v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v)) for k, v in state.items()}
            for p, state in o.state.items()
        }
        for o in optimizers
    ]
    rates = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers]
    random = torch.get_rng_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    on_devices = [torch.cuda.get_rng_state(device) for device in devices]
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, was in zip(tensors, copies, strict=True):
                if not torch.equal(tensor, was):
                    tensor.copy_(was)
            for param, reference, was in grads:
                grad = None if reference is None else reference()
                if grad is not None and was is not None and not torch.equal(grad, was):
                    grad.copy_(was)
                param.grad = was if grad is None else grad
        for optimizer, state, groups in zip(optimizers, states, rates, strict=True):
            optimizer.state.clear()
            for param, values in state.items():
                optimizer.state[param] = {k: _given_back(value, was) for k, (value, was) in values.items()}
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)
        torch.set_rng_state(random)
        for device, state in zip(devices, on_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        for module, training in modes.items():
            module.training = training


def _given_back(value: Any, was: Any) -> Any:
    """Return a value of an optimizer's state with the content that it had: the same tensor, for others may hold it."""
    if not isinstance(value, Tensor):
        return was
    with torch.no_grad():
        if not torch.equal(value, was):
            value.copy_(was)
    return value
