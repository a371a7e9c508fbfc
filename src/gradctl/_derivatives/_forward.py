"""How a caller's function is run: with its inputs or without, with the math backend of attention, with tangents."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from gradctl._derivatives._graph import math_attention
from gradctl._derivatives._variables import Variables, Wanted, variables
from gradctl._errors import UsageError
from gradctl._torch_private import find

MATH_NOTE = "attention ran with the math backend: the fused kernels have no second derivative"


def takes_inputs(function: Callable[..., Any]) -> bool:
    """Whether `function` must be given arguments; one that can do without is called without."""
    target = function.forward if isinstance(function, nn.Module) else function
    if isinstance(target, types.FunctionType) and not hasattr(target, "__wrapped__"):
        code = target.__code__  # what inspect.signature reads too, in a hundredth of its time
        return code.co_argcount > len(target.__defaults__ or ())
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return True  # torch.sin and its like
    return any(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in parameters
    )


def bound(function: Callable[..., Any], wanted: Wanted, *, called: str) -> tuple[Callable[[], Any], Variables]:
    """Return what runs `function`, and the tensors that its result is differentiated with respect to.

    A function that must be given arguments gets copies of `wanted` that require gradients; any other uses `wanted`
    itself, as a loss uses its parameters.

    Raises:
        UsageError: the function takes arguments, and `wanted` is a module or tensors by name.
    """
    if not takes_inputs(function):
        return function, variables(wanted, called=called)
    given = variables(wanted, called=called, needs_grad=False)
    if given.form == "dict":
        raise UsageError(
            f"{_name(function)} must be given arguments, and {called} are named",
            what="a function of named parameters is called without arguments and uses them itself",
            fix=f"wrap it: lambda: {_name(function)}(x)",
        )
    own = tuple(tensor.detach().clone().requires_grad_() for tensor in given.tensors)
    return lambda: function(*own), Variables(own, given.names, given.form)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def run(function: Callable[[], Any]) -> Any:
    """Run `function` as a second derivative needs it: recording, and with the math backend of attention."""
    with torch.enable_grad(), math_attention():
        return function()


def scalar(loss: object, *, called: str = "loss") -> Tensor:
    """Return a loss, held to be one number with a graph.

    Raises:
        UsageError: it is no tensor, has several elements, is not real, or has no graph.
    """
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"the {called} is a {type(loss).__name__}, not a tensor",
            fix="return the loss itself; .item() and float() leave its history behind",
        )
    if loss.numel() != 1:
        raise UsageError(
            f"the {called} has shape {list(loss.shape)}, not one number",
            what="a Hessian is that of one number",
            fix="reduce it: .mean() or .sum(); for several outputs there is gradctl.jacobian",
        )
    with_graph([loss], called=called)
    return loss


def with_graph(outputs: Sequence[Tensor], *, called: str) -> None:
    """Hold tensors to be real, and at least one to have a history.

    Raises:
        UsageError: they are not.
    """
    for output in outputs:
        if not output.dtype.is_floating_point:
            raise UsageError(
                f"the {called} is {str(output.dtype).removeprefix('torch.')}",
                fix="return real floating point values; torch.view_as_real makes them of complex ones",
            )
    if not any(output.requires_grad for output in outputs):
        raise UsageError(
            f"the {called} has no history",
            why="it was computed under no_grad, detached, or from nothing that requires gradients",
            fix="compute it with gradients on, or pass a function that computes it",
        )


class Buffers:
    """Remembers the buffers of every module that is called, and the random state, so that a run can be repeated."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._random = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def remembering(self) -> Generator[None]:
        """Note what modules hold before their first call."""

        def note(module: nn.Module, _: object) -> None:
            if id(module) not in self._seen:
                self._seen[id(module)] = [
                    (buffer, buffer.detach().clone()) for buffer in module.buffers(recurse=False) if module.training
                ]

        handle = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def restore(self) -> None:
        """Put buffers and the random state back."""
        with torch.no_grad():
            for pairs in self._seen.values():
                for buffer, value in pairs:
                    buffer.copy_(value)
        torch.set_rng_state(self._random)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@functools.cache
def _first_level() -> None:
    """Make a dual number once: torch then loads rules of its own, by a way that it has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextlib.contextmanager
def tangents(tensors: Sequence[Tensor], vectors: Sequence[Tensor]) -> Generator[None]:
    """Give leaves a tangent while the block runs, in place: whoever uses them, and however, sees it.

    The values are written over with themselves; the version counters stay as they were.
    """
    _first_level()
    keep = find("preserve_version")
    with forward_ad.dual_level():
        with torch.no_grad(), contextlib.nullcontext() if keep is None else keep(tuple(tensors)):
            for tensor, vector in zip(tensors, vectors, strict=True):
                tensor.copy_(forward_ad.make_dual(tensor.detach(), vector))
        yield


def tangent_of(value: Tensor) -> Tensor | None:
    """Return the tangent of a value without its own history, or None when it has none: it is zero then."""
    found: Tensor | None = forward_ad.unpack_dual(value).tangent
    return None if found is None else found.detach()
