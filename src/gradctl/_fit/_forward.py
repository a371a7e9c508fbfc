"""A model's forward under a plan."""

from __future__ import annotations

import functools
import hashlib
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.nn import Module

from gradctl._errors import UsageError
from gradctl._fit._levers_head import HeadInPlace
from gradctl._recompute import Recording, RegionPlan, Tape, Verify, kind_of, outer_hooks, records_graphs

_MISSING: Final = object()


def digest_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return a digest of what kind of call it is: shapes, dtypes, modes."""
    return hashlib.sha256(repr(kind_of(args, kwargs)).encode()).hexdigest()[:16]


class PlanNotFollowed(UserWarning):
    """A model under a plan did something else than it did when the plan was made; from there on everything is kept."""

    __module__ = "gradctl"


class AppliedPlan:
    """A model whose forward follows a plan, until it is removed.

    Args:
        model: whose `forward` is wrapped, in this instance only.
        calls: what to do in each kind of call, by the digest of the kind.
        verify: what is remembered of a dropped result.
        head: write the gradient of a cross-entropy in place.
    """

    def __init__(self, model: Module, calls: Mapping[str, RegionPlan], verify: Verify, *, head: bool = False) -> None:
        self.model = model
        self.calls = dict(calls)
        self.verify: Verify = verify
        self._before = model.__dict__.get("forward", _MISSING)
        if isinstance(self._before, PlannedForward):
            raise UsageError(
                f"this {type(model).__name__} follows a plan already",
                what="a plan was applied to it before, and not undone",
                fix="plan.undo() first",
            )
        self._ours = PlannedForward(model, model.forward, self.calls, verify, head=head)
        model.__dict__["forward"] = self._ours

    def remove(self) -> None:
        """Give the model its own forward back; a second call does nothing."""
        if self.model.__dict__.get("forward") is not self._ours:
            return
        if self._before is _MISSING:
            del self.model.__dict__["forward"]
        else:
            self.model.__dict__["forward"] = self._before


class PlannedForward:
    """Runs a model's forward on a tape that follows a plan."""

    def __init__(
        self,
        model: Module,
        forward: Callable[..., Any],
        calls: dict[str, RegionPlan],
        verify: Verify,
        *,
        head: bool = False,
    ) -> None:
        self._forward = forward
        self._calls = calls
        self._verify: Verify = verify
        self._head = head
        self._warned = False
        self._model = weakref.ref(model)
        functools.update_wrapper(self, forward, updated=())
        del self.__wrapped__  # type: ignore[attr-defined]  # a bound method: it would lead a copy to the first model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = self._call
        if "torch._dynamo" in sys.modules:
            call = torch.compiler.disable(call)
        return call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not records_graphs():
            return self._forward(*args, **kwargs)
        plan = self._calls.get(digest_of(args, kwargs)) or next(iter(self._calls.values()))
        tape = (HeadInPlace if self._head else Tape)(plan=plan, verify=self._verify, outer=outer_hooks())
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, tape.unpack), Recording(tape):
            out = self._forward(*args, **kwargs)
        tape.finish()
        if tape.lost_at is not None:
            self._other_than_planned(plan, tape.lost_at)
        return out

    def _other_than_planned(self, plan: RegionPlan, at: int) -> None:
        if self._warned:
            return
        self._warned = True
        segment = sum(cut <= at for cut in plan.cuts)
        expected = str(plan.functions[at]) if at < len(plan.functions) else "the end"
        warnings.warn(
            f"the model did not do what its plan expects from operation {at} on "
            f"(segment {segment}, expected {expected}): everything after it is kept, and the budget may be exceeded; "
            "make a new plan for these inputs",
            PlanNotFollowed,
            stacklevel=2,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = getattr(self._forward, "__self__", None)
        copied = memo.get(id(owner))
        assert copied is not None, "a forward is copied with its model"
        bound: Any = self._forward
        return PlannedForward(copied, bound.__func__.__get__(copied), self._calls, self._verify, head=self._head)
