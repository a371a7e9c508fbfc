"""What happened once: facts with a step and the names of the parameters they are about."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl._errors import NonFiniteGradient
from gradctl._journal import EVENTS_KEPT, JournalWriter
from gradctl._record._gradients import local_part
from gradctl._record._quiet import Quiet
from gradctl._record._state import OptimizerState

_NAMES = 50
_NAMES_AGAIN = 3
_STALL_ROWS = 3


class Events:
    """Writes events.

    Args:
        journal: where they are written.
        name: returns a name for each of some tensors that no optimizer holds.
        meant: writes what an optimizer's tensors lack because the program says so; called before what they lack.
    """

    def __init__(
        self,
        journal: JournalWriter,
        name: Callable[[Sequence[Tensor]], list[str | None]],
        meant: Callable[[OptimizerState], None],
    ) -> None:
        self._meant = meant
        self._journal = journal
        self._name = name
        self._outside: dict[int, weakref.ref[Tensor]] = {}
        self._outside_written = 0
        self._skips = 0

    def nonfinite(self, state: OptimizerState, step: int, indexes: Sequence[int], of: int, what: str = "grad") -> None:
        """Write that the gradients (or weights) `indexes` of `of` tensors hold NaN or inf in `step`."""
        if state.bad_streak >= EVENTS_KEPT:
            self._journal.event("nonfinite")  # counted only
            return
        # Once a run is lost every step is: the names are written in full where it begins.
        shown = indexes[: _NAMES if state.bad_streak == 0 else _NAMES_AGAIN]
        self._journal.event(
            "nonfinite",
            o=state.o,
            n=step,
            what=what,
            params=[state.name(index) for index in shown],
            count=len(indexes),
            of=of,
        )

    def bad_loss(self, state: OptimizerState | None, step: int, params: Sequence[Tensor]) -> None:
        """Write that the loss is NaN or inf, and, where that is so, that weights are already."""
        if state is None:
            self._journal.event("nonfinite", n=step, what="loss", params=[], count=1, of=1)
            return
        first = state.loss_bad == 0
        state.loss_bad += 1
        self._journal.event("nonfinite", o=state.o, n=step, what="loss", params=[], count=1, of=1)
        if not first:
            return
        with Quiet():
            locals_ = [local_part(param) for param in params]
            bad = [
                index
                for index, local in enumerate(locals_)
                if local is not None and local.is_cpu and not bool(torch.isfinite(local).all())
            ]
        if bad:
            self.nonfinite(state, step, bad, len(params), what="weight")

    def skip(self, state: OptimizerState | None, step: int, scale: float | None) -> None:
        """Write that a scaler skipped the update of `step`."""
        self._skips += 1
        fields: dict[str, Any] = {"scale": scale}
        if state is not None:
            fields["o"] = state.o
            state.skips += 1
        self._journal.event("skip", n=step, **fields)

    def never_stepped(self, made: Mapping[str, int], backwards: int) -> None:
        """Write that backwards ran, and that no optimizer of all that were made has been asked for a step.

        Args:
            made: how many optimizers of each class were made.
            backwards: accumulating backwards in all.
        """
        if self._skips:
            return  # the program asked, and its scaler skipped every step
        for cls, count in made.items():
            self._journal.event("never_stepped", cls=cls, backwards=backwards, count=count)

    def none(self, state: OptimizerState) -> None:
        """Write which parameters have never got a gradient, if that is other than what was written last."""
        self._meant(state)
        missing = sorted(state.never)
        if (not missing and state.none_written <= 0) or len(missing) == state.none_written:
            return
        state.none_written = len(missing)
        self._journal.event(
            "none",
            o=state.o,
            n=state.steps,
            params=[state.name(index) for index in missing[:_NAMES]],
            count=len(missing),
        )

    def accumulation(self, state: OptimizerState, since: int, microbatches: int) -> None:
        """Write that from step `since` on every step has had that many backwards."""
        self._journal.event("accumulation", o=state.o, n=since, microbatches=microbatches)

    def stall(self, state: OptimizerState) -> None:
        """Write which 16-bit weights mostly do not move, once rows in a row say so and when there are twice as many."""
        stalled = sorted(index for index, rows in state.stalls.items() if rows >= _STALL_ROWS)
        if not stalled or len(stalled) < 2 * state.stall_written:
            return
        state.stall_written = len(stalled)
        share = sum(state.stall_share[index] for index in stalled) / len(stalled)
        self._journal.event(
            "stall",
            o=state.o,
            n=state.steps,
            params=[state.name(index) for index in stalled[:_NAMES]],
            count=len(stalled),
            share=round(share, 3),
        )

    def remember_leaves(self, leaves: Iterable[Tensor]) -> None:
        """Remember, weakly, parameters that a backward reaches."""
        for leaf in leaves:
            if isinstance(leaf, Parameter):
                self._outside[id(leaf)] = weakref.ref(leaf)

    def unoptimized(self, held: set[int]) -> None:
        """Write which remembered parameters have a gradient and are in no optimizer.

        Args:
            held: `id` of every parameter that an optimizer holds.
        """
        found: list[Tensor] = []
        with torch._C.DisableTorchFunction():
            for key, reference in list(self._outside.items()):
                leaf = reference()
                if leaf is None or key in held:
                    self._outside.pop(key, None)
                elif leaf.grad is not None and leaf.requires_grad:
                    found.append(leaf)
        if len(found) <= self._outside_written:
            return
        self._outside_written = len(found)
        names = self._name(found[:_NAMES])
        params = [
            name if name is not None else f"parameter of shape {list(leaf.shape)}"
            for name, leaf in zip(names, found, strict=False)
        ]
        self._journal.event("unoptimized", params=params, count=len(found))

    def not_seen(self, what: str, why: str) -> None:
        """Write that something could not be recorded."""
        self._journal.event("not_seen", what=what, why=why)

    def forget(self) -> None:
        """Let go of what was remembered."""
        self._outside.clear()


def stopped(state: OptimizerState, step: int, indexes: Sequence[int]) -> NonFiniteGradient:
    """Return the error that stops a program which asked for it."""
    first = state.name(indexes[0])
    others = f" and {len(indexes) - 1} others" if len(indexes) > 1 else ""
    return NonFiniteGradient(
        f"{first} got a gradient that is NaN or inf in step {step}",
        what=f"{first}{others} of {state.num} tensors of {state.cls}; the update was not applied",
        why="gradctl was asked to stop at the first non-finite gradient",
        fix="look at the report of this run, then at the loss and the learning rate of the steps before",
    )
