"""Gradients of each sample of a batch: batched by vmap where that is exact, else one sample after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradctl._derivatives._batch import (
    Batch,
    Check,
    Generators,
    LossFn,
    Reduction,
    call,
    evaluated,
    memory,
    read_batch,
    refuse_batch_statistics,
    require_module,
    scalar,
    signature,
    trained,
)
from gradctl._derivatives._factor_norms import formed
from gradctl._derivatives._graph_rows import Plan, read_graph
from gradctl._derivatives._per_sample_check import check_sum, plain_gradient, refuse_reentrant, tolerance
from gradctl._derivatives._shares import Shares, shares_of
from gradctl._derivatives._weight_uses import Dense, Factors
from gradctl._errors import GradctlError, NotPerSample, UsageError

Method = Literal["auto", "graph", "vmap", "loop"]


class PerSampleGrads(dict[str, Tensor]):
    """Gradients by parameter name, each `[B, *parameter.shape]`, and how they were computed.

    Attributes:
        method: `"graph"`, `"vmap"` or `"loop"`.
        why: what vmap said when it could not run the model; empty otherwise.
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
    plan: Plan | None
    checked: bool


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
        chunk: most samples at a time with vmap; less memory, more time.
        method: "graph" (one forward and backward of the batch, split by sample where the graph takes its weights),
            "vmap" (torch.func), "loop" (one sample at a time; whatever plain autograd can do), or "auto": the first
            of these that is exact for this model.
    Returns:
        A dict by parameter name of tensors [B, *parameter.shape], with `.method` and `.why`.
    Raises:
        NotPerSample: samples depend on each other (names the module), or an operation cannot be split by sample.
        UsageError: `reduction` is not what `loss_fn` does, or the batch has no rows.
    """
    model = require_module(model, "per_sample_grads")
    if reduction not in ("mean", "sum", "share"):
        raise UsageError(f"reduction is 'mean', 'sum' or 'share', got {reduction!r}")
    if method not in ("auto", "graph", "vmap", "loop"):
        raise UsageError(f"method is 'auto', 'graph', 'vmap' or 'loop', got {method!r}")
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
    checked = check == "always" or (check == "first" and (known is None or not known.checked))
    generators = Generators(parameters)

    why = known.why if known else ""
    plan = known.plan if known else None
    # What a sample adds to the batch is the gradient of its loss alone only where that was checked.
    sure = checked or reduction == "share" or (known is not None and known.checked)
    if method == "graph" or (method == "auto" and sure and (known is None or known.method == "graph")):
        found = from_graph(model, loss_fn, rows, parameters, plan, generators, reduction=reduction)
        if found is None:
            if method == "graph":
                raise _without_graph(model, loss_fn, rows, parameters, generators)
            generators.put_back()
        elif not checked or _holds_for_two(model, loss_fn, rows, parameters, found[0], reduction, generators):
            if check != "off" and found[1].lasting:
                facts[key] = _Known("graph", "", found[1], checked or (known is not None and known.checked))
            return PerSampleGrads(found[0], method="graph", why="")
        else:
            generators.put_back()

    shares = _shares(model, loss_fn, rows, generators) if reduction == "share" else None
    start = known.method if known and known.method != "graph" else ("loop" if method == "loop" else "vmap")
    grads, used, reason = per_sample_of(
        model, loss_fn, rows, parameters, shares=shares, chunk=chunk, start=start, fall_back=method != "vmap"
    )
    why = reason or why
    draws = generators.moved()
    # Shares belong to the masks of the batch's own forward: whether the same were drawn again is never taken on trust.
    if checked or (draws and shares is not None):

        def again(model: nn.Module, rows: Batch, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
            generators = Generators(parameters)
            shares = _shares(model, loss_fn, rows, generators) if reduction == "share" else None
            compute = batched if used == "vmap" else one_by_one
            return compute(model, loss_fn, rows, parameters, shares=shares)

        try:
            check_sum(model, loss_fn, rows, parameters, grads, reduction, generators, again)
        except GradctlError:
            if used == "loop" or method == "vmap":
                raise
            # The loop decides: vmap does not see gradient hooks, nor what loss_fn itself takes from the model.
            generators.put_back()
            used, why = "loop", "vmap found other gradients than plain autograd"
            grads = one_by_one(model, loss_fn, rows, parameters, shares=shares)
            check_sum(model, loss_fn, rows, parameters, grads, reduction, generators, again)
    elif draws and used == "loop":
        _leave_as_a_plain_call(model, loss_fn, rows, generators)
    if check != "off":
        facts[key] = _Known(used, why, None, True)
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
    constants = {name: value.detach() for name, value in model.named_parameters() if name not in held}
    constants |= {name: value.clone() for name, value in model.named_buffers()}

    def of_one(taken: dict[str, Tensor], constants: dict[str, Tensor], *leaves: Tensor) -> Tensor:
        mine, given = leaves[:count], leaves[count:]
        one = batch.replaced([leaf.unsqueeze(0) for leaf in mine], 1)
        outputs = functional_call(model, (taken, constants), one.inputs, one.keywords)
        if shares is None:
            return scalar(loss_fn(outputs, *one.targets))
        return shares.weigh(outputs, [value.unsqueeze(0) for value in given])

    leaves = [*batch.leaves(), *(shares.values if shares else [])]
    count = len(leaves) - (len(shares.values) if shares else 0)
    # Every sample draws its own mask: one for all samples is no per-sample gradient of the training.
    mapped = vmap(grad(of_one), in_dims=(None, None, *([0] * len(leaves))), randomness="different", chunk_size=chunk)
    on_cpu = all(leaf.device.type == "cpu" for leaf in leaves)
    # Flash attention has no batched form on CPU: vmap would run it sample by sample.
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext():
        found: dict[str, Tensor] = mapped(held, constants, *leaves)
    return found


def from_graph(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    plan: Plan | None,
    generators: Generators,
    *,
    reduction: Reduction,
) -> tuple[dict[str, Tensor], Plan] | None:
    """Per-sample gradients from one forward and backward of the batch; None when a parameter is not understood."""
    scale = batch.size if reduction == "mean" else 1
    read = read_graph(model, loss_fn, batch, parameters, plan, generators, in_order=True, scale=scale)
    if read is None or read.others:
        return None
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in parameters.items():
            shape = (batch.size, *value.shape)
            sums: list[Tensor] = []
            for some in read.parts[name].values():
                sums += [part.rows.reshape(shape) for part in some if isinstance(part, Dense)]
                factors = [part for part in some if isinstance(part, Factors)]
                if factors:
                    wide = value.numel() * factors[0].groups // factors[0].right.shape[2]
                    sums.append(formed(factors, wide).reshape(shape))
            if not sums:
                sums.append(torch.zeros(shape, dtype=value.dtype, device=value.device))
            found[name] = (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)).to(value.dtype)
    return found, read.plan


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
            if index == 0:
                refuse_reentrant(loss)
            for name, gradient in zip(names, plain_gradient(loss, values), strict=True):
                found[name][index] = gradient
    return found


def _shares(model: nn.Module, loss_fn: LossFn, batch: Batch, generators: Generators) -> Shares:
    with torch.enable_grad():
        outputs, loss = call(model, loss_fn, batch)
        found = shares_of(outputs, loss, batch.size)
    # The masks of this forward are drawn again by the one that is differentiated.
    generators.put_back()
    return found


def _holds_for_two(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    reduction: Reduction,
    generators: Generators,
) -> bool:
    """Whether the first and the last row are what plain autograd finds for these samples alone."""
    after = Generators(parameters)
    drawn = generators.moved()
    try:
        if drawn:
            # Masks differ between a batch and a sample alone; whether the rows are right does not depend on them.
            with evaluated(model):
                quiet = Generators(parameters)
                found = from_graph(model, loss_fn, batch, parameters, None, quiet, reduction=reduction)
                return (
                    found is not None
                    and not quiet.moved()
                    and _holds_for_two(model, loss_fn, batch, parameters, found[0], reduction, quiet)
                )
        shares = _shares(model, loss_fn, batch, generators) if reduction == "share" else None
        places = sorted({0, batch.size - 1})
        some = torch.tensor(places)
        rows = batch.replaced([leaf[some.to(leaf.device)] for leaf in batch.leaves()], len(places))
        if shares is not None:
            shares = Shares(shares.places, [value[some.to(value.device)] for value in shares.values])
        exact = one_by_one(model, loss_fn, rows, parameters, shares=shares)
        off = scale = 0.0
        for name, value in exact.items():
            wide = torch.promote_types(value.dtype, torch.float32)
            off += float((grads[name][places].to(wide) - value.to(wide)).abs().square().sum())
            scale += float(grads[name].to(wide).abs().square().sum()) * len(places) / batch.size
        return off <= tolerance(parameters) ** 2 * scale
    finally:
        after.put_back()


def _leave_as_a_plain_call(model: nn.Module, loss_fn: LossFn, batch: Batch, generators: Generators) -> None:
    """Draw once what a plain call of the model on this batch draws."""
    generators.put_back()
    with torch.no_grad():
        call(model, loss_fn, batch)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _without_graph(
    model: nn.Module, loss_fn: LossFn, batch: Batch, parameters: Mapping[str, Tensor], generators: Generators
) -> NotPerSample:
    read = read_graph(model, loss_fn, batch, parameters, None, generators, in_order=True)
    others = read.others if read is not None else dict.fromkeys(parameters, "nothing that takes gradients")
    name, operation = next(iter(others.items()))
    return NotPerSample(
        f"{name} is used by {operation}, which has no rule",
        what="its gradient cannot be read per sample from the graph of the batch",
        why="method='graph' was asked for",
        fix="method='auto' takes vmap or the exact loop here",
    )


def _without_vmap(error: BaseException) -> NotPerSample:
    return NotPerSample(
        "vmap cannot run this model",
        what=_first_line(error),
        why="method='vmap' was asked for",
        fix="method='auto' takes the exact loop over the samples here",
    )
