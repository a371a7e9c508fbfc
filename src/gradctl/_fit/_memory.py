"""`gradctl.memory`: run one training step and say where its bytes are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from gradctl._errors import UsageError
from gradctl._fit._api import restored
from gradctl._fit._memory_facts import report_of
from gradctl._fit._memory_report import MemoryReport
from gradctl._fit._memory_watch import StepWatch


def memory(step: Callable[[], Any], model: Module | None = None) -> MemoryReport:
    """Run one training step and say where its bytes are: what is alive at the peak, and what backward remembers.

    The step is run once. Bytes are those that the allocators gave out, to the byte; storages are named by the module
    and the line that made or saved them. Weights, buffers, gradients, optimizer state and random state are left as they
    were found. The optimizers are found by themselves, those that hold weights of a module that the step calls.

    Args:
        step: runs one whole training step: forward, backward and, if it is there, the optimizer's step.
        model: the model; without it every outermost module that the step calls is one.

    Returns:
        The report; `print` shows it, `to_json` keeps it.

    Raises:
        UsageError: the step computes nothing with tensors, or a profiler of the program is running.
    """
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    optimizers = found if model is None else [one for one in found if _trains(one, model)]
    random = torch.get_rng_state()
    gc.collect()
    with ExitStack() as stack:
        stack.callback(torch.set_rng_state, random)
        if model is None:
            # A model is met when it is called, and its gradients may be cleared by then.
            stack.enter_context(_gradients_kept(optimizers))

        def keep(met: Module) -> None:
            stack.enter_context(restored(met, [one for one in optimizers if _trains(one, met)]))

        watch = StepWatch([] if model is None else [model], optimizers, on_model=keep)
        watch.begin()
        try:
            # What it returns is let go at once: a loss would keep the graph, and what is saved in it.
            step()
        finally:
            facts = watch.end()
        if not facts.events and not facts.saved:
            raise UsageError(
                "the step did nothing with tensors",
                what="no operation was seen while it ran",
                why="it may only define something, or work in another thread",
                fix="pass a function that runs forward and backward: gradctl.memory(lambda: loss_of(batch).backward())",
            )
        return report_of(facts)


@contextmanager
def _gradients_kept(optimizers: list[Optimizer]) -> Generator[None]:
    params = {id(p): p for one in optimizers for group in one.param_groups for p in group["params"]}
    kept = [(p, weakref.ref(p.grad), p.grad.detach().clone()) for p in params.values() if p.grad is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for param, reference, copy in kept:
                grad = reference()
                if grad is not None:
                    grad.copy_(copy)
                param.grad = copy if grad is None else grad


def _trains(optimizer: Optimizer, model: Module) -> bool:
    own = {id(param) for param in model.parameters()}
    return any(id(param) in own for group in optimizer.param_groups for param in group["params"])
