"""`mismatches`: compare the gradients of a plain function of tensors with finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradctl._errors import UsageError
from gradctl._finite_difference._double import (
    as_given,
    differentiable,
    double,
    double_by_default,
    with_casts_raised,
)
from gradctl._finite_difference._mismatch import Comparison, Mismatch
from gradctl._finite_difference._point import Subject
from gradctl._finite_difference._search import RoundsToSingle, compare
from gradctl._finite_difference._trees import replaced, tensors

_HALVES = (torch.float16, torch.bfloat16)


def mismatches(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    probes: int = 3,
    order: int = 1,
    seed: int = 0,
) -> list[Mismatch]:
    """Return the inputs of `fn` whose gradients are not derivatives; an empty list when all are right.

    `fn` runs under autograd on float64 copies of the inputs (complex128 of complex ones), or on copies in their own
    dtype when it refuses those. Kinks are no mismatch. Random states are put back.

    Args:
        fn: takes the inputs, returns a tensor or a nested structure of them.
        inputs: positional arguments; tensors of integers and what is no tensor are passed on.
        names: what the inputs are called; `input[0]`, ... otherwise.
        probes: how many random directions.
        order: 2 compares the gradient of the gradient.
        seed: of the directions.

    Raises:
        UsageError: no input is floating; no output is; an output is not finite; half precision that cannot be raised.
    """
    called = list(names) if names is not None else [f"input[{i}]" for i in range(len(inputs))]
    return list(compare_function(fn, tuple(inputs), {}, called, probes=probes, order=order, seed=seed).mismatches)


def compare_function(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    *,
    probes: int = 3,
    order: int = 1,
    seed: int = 0,
) -> Comparison:
    """Do what `mismatches` does, and return all that was measured."""
    return compare_in_double(
        lambda convert: function_subject(fn, args, kwargs, names, convert),
        [tensor for _, tensor in tensors([args, kwargs])],
        probes=probes,
        order=order,
        seed=seed,
    )


def compare_in_double(
    build: Callable[[Callable[[Tensor], Tensor]], Subject],
    given: Sequence[Tensor],
    *,
    probes: int = 3,
    order: int = 1,
    seed: int = 0,
) -> Comparison:
    """Compare in float64, or in the dtypes that were given when the function fails with float64.

    A function that casts to float32 on the way is compared with these casts going to float64, where it can be.

    Args:
        build: makes the subject, with every tensor converted by the function that it is given.
        given: all tensors that take part, in their own dtypes.
        probes: how many random directions.
        order: 2 compares the gradient of the gradient.
        seed: of the directions.

    Raises:
        UsageError: see `mismatches`.
    """
    try:
        with double_by_default():
            try:
                return compare(build(double), probes=probes, seed=seed, order=order, rounding="raise")
            except RoundsToSingle:
                pass
            try:
                raised = with_casts_raised(build(double))
                return replace(compare(raised, probes=probes, seed=seed, order=order), casts_raised=True)
            except Exception:  # it needs its casts
                return compare(build(double), probes=probes, seed=seed, order=order)
    except UsageError:
        raise
    except Exception as refused:
        dtypes = {tensor.dtype for tensor in given if differentiable(tensor)}
        if dtypes <= {torch.float64, torch.complex128}:
            raise
        try:
            with double_by_default():
                raised = with_casts_raised(build(double))
                return replace(compare(raised, probes=probes, seed=seed, order=order), casts_raised=True)
        except Exception:
            half = next((dtype for dtype in _HALVES if dtype in dtypes), None)
            if half is not None:
                raise no_half(half, refused) from refused
        return compare(build(as_given), probes=probes, seed=seed, order=order)


def function_subject(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    convert: Callable[[Tensor], Tensor],
    *,
    wanted: Sequence[str] | None = None,
) -> Subject:
    """Describe a function of its arguments.

    Args:
        fn: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        names: of the positional ones.
        convert: makes the values, and what is passed beside them, from the arguments' tensors.
        wanted: paths of the tensors that are values; by default of those that require a gradient, or of all floating
            ones when none does.

    Raises:
        UsageError: no tensor is a value, and none was asked for.
    """
    labelled = [(name, value) for name, value in zip(names, args, strict=True)] + list(kwargs.items())
    every = [pair for name, value in labelled for pair in tensors(value, name)]
    if wanted is None:
        floating = [(name, tensor) for name, tensor in every if differentiable(tensor)]
        wanted = [name for name, tensor in floating if tensor.requires_grad] or [name for name, _ in floating]
        if not wanted:
            kinds = ", ".join(f"{name} ({str(tensor.dtype).removeprefix('torch.')})" for name, tensor in every)
            raise UsageError(
                "no input has a derivative",
                what=f"inputs: {kinds or 'no tensor'}",
                fix="pass at least one tensor of a floating or complex dtype",
            )
    chosen = [(name, tensor) for name, tensor in every if name in wanted]
    position = {name: i for i, (name, _) in enumerate(chosen)}
    fixed = {name: convert(tensor.detach()) for name, tensor in every if name not in wanted}

    def run(leaves: Sequence[Tensor]) -> list[Tensor]:
        # Copies, so that a function may change its arguments in place.
        def passed(name: str, _: Tensor) -> Tensor:
            return leaves[position[name]].clone() if name in position else fixed[name].clone()

        built = [replaced(value, passed, name) for name, value in labelled]
        result = fn(*built[: len(args)], **dict(zip(kwargs, built[len(args) :], strict=True)))
        return floating_outputs(result)

    return Subject(
        run=run,
        names=tuple(name for name, _ in chosen),
        values=tuple(convert(tensor.detach()).clone(memory_format=torch.contiguous_format) for _, tensor in chosen),
    )


def floating_outputs(result: Any) -> list[Tensor]:
    """Return the outputs that can have a derivative."""
    return [tensor for _, tensor in tensors(result) if differentiable(tensor)]


def no_half(dtype: torch.dtype, refused: Exception) -> UsageError:
    """Say that a check in half precision would say nothing."""
    name = str(dtype).removeprefix("torch.")
    reason = next(iter(str(refused).splitlines()), type(refused).__name__)
    return UsageError(
        f"a derivative cannot be checked in {name}",
        what=f"in float64 the function failed: {reason}",
        why="rounding of half types is larger than the differences that a check measures",
        fix="let the function take float64 (or float32) tensors, and check it with those",
    )
