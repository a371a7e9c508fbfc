"""Gradients of each sample of a batch: batched by vmap where that is exact, else one sample after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gradctl._derivatives._batch import (
    Batch,
    Check,
    Generators,
    LossFn,
    Reduction,
    call,
    memory,
    output_tensors,
    read_batch,
    refuse_batch_statistics,
    require_module,
    scalar,
    signature,
    trained,
)
from gradctl._derivatives._per_sample_check import check_sum, refuse_unsplittable
from gradctl._errors import GradctlError, NotPerSample, UsageError

Method = Literal["auto", "vmap", "loop"]


class PerSampleGrads(dict[str, Tensor]):
    """Gradients by parameter name, each `[B, *parameter.shape]`, and how they were computed.

    Attributes:
        method: `"vmap"` or `"loop"`.
        why: why the batched method was not taken; empty when it was.
    """

    def __init__(self, grads: Mapping[str, Tensor], *, method: str, why: str) -> None:
        super().__init__(grads)
        self.method = method
        self.why = why


@dataclass(frozen=True, slots=True)
class _Known:
    """What the first call with a signature has found."""

    method: str
    why: str


def per_sample_grads(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    reduction: Reduction = "mean",
    check: Check = "first",
    chunk: int | None = None,
    method: Method = "auto",
) -> PerSampleGrads:
    """Compute the gradient of each sample's loss, exactly or not at all.

    Buffers, train and eval flags and `.grad` are left alone, and random generators as one plain call of the model
    leaves them. Every sample draws its own dropout mask.

    Args:
        model: a module; its parameters that take gradients are differentiated. Each is listed once, under its first
            name, also when modules share it or a weight is used outside of its module.
        loss_fn: called as `loss_fn(model(inputs), *targets)`; returns the loss of the batch, shape [].
        batch: `(inputs, *targets)`, or inputs alone; inputs are a tensor, a tuple of positional or a dict of keyword
            arguments. Every tensor has shape [B, ...].
        reduction: what `loss_fn` does over its batch. With "mean" and "sum", row b is the gradient of
            `loss_fn(model(x[b:b+1]), y[b:b+1])`; with "share" (class weights, `ignore_index`, losses between samples)
            it is what sample b adds to the gradient of the batch: the rows add up to it.
        check: "first" compares the sum of the rows with the gradient of the batch at the first call with these
            shapes, modes and loss (one plain gradient more), "always" at every call, "off" never.
        chunk: most samples at a time in the batched method; less memory, more time.
        method: "vmap" (batched), "loop" (one sample at a time; works with everything that plain autograd does), or
            "auto": vmap, and the loop when the model does something that vmap cannot.
    Returns:
        A dict by parameter name of tensors [B, *parameter.shape], with `.method` and `.why`.
    Raises:
        NotPerSample: samples depend on each other (names the module), or an operation cannot be split by sample.
        UsageError: `reduction` is not what `loss_fn` does, or the batch has no rows.
    """
    model = require_module(model, "per_sample_grads")
    if reduction not in ("mean", "sum", "share"):
        raise UsageError(f"reduction is 'mean', 'sum' or 'share', got {reduction!r}")
    if method not in ("auto", "vmap", "loop"):
        raise UsageError(f"method is 'auto', 'vmap' or 'loop', got {method!r}")
    if check not in ("first", "always", "off"):
        raise UsageError(f"check is 'first', 'always' or 'off', got {check!r}")
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk is the most samples at a time, got {chunk}")
    rows = read_batch(batch)
    parameters = trained(model)
    refuse_batch_statistics(model)
    facts = memory(model)
    key = signature(model, loss_fn, rows, "grads", reduction, method)
    known: _Known | None = facts.get(key)

    generators = Generators(parameters)
    shares = _shares(model, loss_fn, rows, generators) if reduction == "share" else None
    start = known.method if known else ("vmap" if method == "auto" else method)
    grads, used, why = per_sample_of(
        model, loss_fn, rows, parameters, shares=shares, chunk=chunk, start=start, fall_back=method == "auto"
    )
    why = known.why if known else why
    draws = generators.moved()
    if check == "always" or (check == "first" and known is None):

        def again(model: nn.Module, rows: Batch, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
            generators = Generators(parameters)
            shares = _shares(model, loss_fn, rows, generators) if reduction == "share" else None
            compute = batched if used == "vmap" else one_by_one
            return compute(model, loss_fn, rows, parameters, shares=shares)

        check_sum(model, loss_fn, rows, parameters, grads, reduction, generators, again)
    elif draws and used == "loop":
        _leave_as_a_plain_call(model, loss_fn, rows, generators)
    if check != "off":
        facts[key] = _Known(used, why)
    return PerSampleGrads(grads, method=used, why=why)


def per_sample_of(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    *,
    shares: Shares | None = None,
    chunk: int | None = None,
    start: str = "vmap",
    fall_back: bool = True,
) -> tuple[dict[str, Tensor], str, str]:
    """Per-sample gradients by the first method that works: the gradients, the method, and why not the batched one.

    Raises:
        NotPerSample: vmap cannot run the model, and the loop was not allowed.
    """
    if start == "loop":
        return one_by_one(model, loss_fn, rows, parameters, shares=shares), "loop", ""
    generators = Generators(parameters)
    try:
        return batched(model, loss_fn, rows, parameters, chunk=chunk, shares=shares), "vmap", ""
    except GradctlError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if not fall_back:
            raise _without_vmap(error) from error
        why = _first_line(error)
    generators.put_back()
    return one_by_one(model, loss_fn, rows, parameters, shares=shares), "loop", why


def batched(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    *,
    chunk: int | None = None,
    shares: Shares | None = None,
) -> dict[str, Tensor]:
    """Per-sample gradients by `vmap(grad)`; with `shares`, of the outputs weighted by them instead of the loss."""
    held = {name: value.detach() for name, value in parameters.items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def of_one(taken: dict[str, Tensor], *leaves: Tensor) -> Tensor:
        mine, given = leaves[:count], leaves[count:]
        one = batch.replaced([leaf.unsqueeze(0) for leaf in mine], 1)
        outputs = functional_call(model, (taken, buffers), one.inputs, one.keywords)
        if shares is None:
            return scalar(loss_fn(outputs, *one.targets))
        return shares.weigh(outputs, [value.unsqueeze(0) for value in given])

    leaves = [*batch.leaves(), *(shares.values if shares else [])]
    count = len(leaves) - (len(shares.values) if shares else 0)
    # Every sample draws its own mask: one for all samples is no per-sample gradient of the training.
    mapped = vmap(grad(of_one), in_dims=(None, *([0] * len(leaves))), randomness="different", chunk_size=chunk)
    found: dict[str, Tensor] = mapped(held, *leaves)
    return found


def one_by_one(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    *,
    shares: Shares | None = None,
) -> dict[str, Tensor]:
    """Per-sample gradients by plain autograd, one sample at a time."""
    names, values = list(parameters), list(parameters.values())
    found = {
        name: torch.zeros((batch.size, *value.shape), dtype=value.dtype, device=value.device)
        for name, value in parameters.items()
    }
    with torch.enable_grad():
        for index in range(batch.size):
            outputs, loss = call(model, loss_fn, batch.row(index))
            if shares is not None:
                loss = shares.weigh(outputs, [value[index : index + 1] for value in shares.values])
            for name, gradient in zip(names, plain_gradient(loss, values), strict=True):
                found[name][index] = gradient
    return found


def plain_gradient(loss: Tensor, values: list[Tensor], *, retain_graph: bool = False) -> list[Tensor]:
    """The gradient of a loss, with zeros for what it does not depend on.

    Raises:
        NotPerSample: the forward used reentrant activation checkpointing.
    """
    if not loss.requires_grad:
        return [torch.zeros_like(value) for value in values]
    try:
        grads = torch.autograd.grad(loss, values, allow_unused=True, retain_graph=retain_graph)
    except RuntimeError as error:
        refuse_unsplittable(error)
        raise
    return [
        torch.zeros_like(value) if g is None else (g.to_dense() if g.is_sparse else g)
        for g, value in zip(grads, values, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Shares:
    """The gradient of the loss of a batch with respect to its outputs.

    Args:
        places: which of the tensors in the outputs have a row for each sample.
        values: the gradient of each of those, [B, ...].
    """

    places: list[int]
    values: list[Tensor]

    def weigh(self, outputs: Any, values: list[Tensor]) -> Tensor:
        """The sum of the outputs weighted by these rows, shape []: its gradient is the share of the rows."""
        tensors = output_tensors(outputs)
        total = [(tensors[place] * value).sum() for place, value in zip(self.places, values, strict=True)]
        return torch.stack(total).sum()


def shares_of(outputs: Any, loss: Tensor, size: int, *, retain_graph: bool = False) -> Shares:
    """Split the gradient of a loss by the rows of the outputs that it was computed from.

    Raises:
        UsageError: the outputs have no row for each sample.
    """
    tensors = output_tensors(outputs)
    places = [
        place for place, one in enumerate(tensors) if one.dim() and one.shape[0] == size and one.requires_grad
    ]
    found: list[Tensor | None] = []
    if places and loss.requires_grad:
        rows = [tensors[place] for place in places]
        found = list(torch.autograd.grad(loss, rows, allow_unused=True, retain_graph=retain_graph))
    used = {place: value for place, value in zip(places, found, strict=False) if value is not None}
    if not used:
        raise UsageError(
            "the loss does not come from outputs with a row for each sample",
            what=f"no tensor that the model returns has shape [{size}, ...] and leads to the loss",
            fix="let the model return [B, ...] and compute the loss from it in loss_fn",
        )
    return Shares(list(used), list(used.values()))


def _shares(
    model: nn.Module, loss_fn: LossFn, batch: Batch, generators: Generators
) -> Shares:
    with torch.enable_grad():
        outputs, loss = call(model, loss_fn, batch)
        found = shares_of(outputs, loss, batch.size)
    # The masks of this forward are drawn again by the one that is differentiated.
    generators.put_back()
    return found


def _leave_as_a_plain_call(model: nn.Module, loss_fn: LossFn, batch: Batch, generators: Generators) -> None:
    """Draw once what a plain call of the model on this batch draws."""
    generators.put_back()
    with torch.no_grad():
        call(model, loss_fn, batch)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _without_vmap(error: BaseException) -> NotPerSample:
    return NotPerSample(
        "vmap cannot run this model",
        what=_first_line(error),
        why="method='vmap' was asked for",
        fix="method='auto' takes the exact loop over the samples here",
    )
