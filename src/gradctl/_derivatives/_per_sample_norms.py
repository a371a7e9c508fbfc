"""Norms of per-sample gradients from what the layers saw, without forming the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

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
    signature,
    trained,
)
from gradctl._derivatives._factor_norms import products, squared_norms
from gradctl._derivatives._graph_rows import Parts, Plan, Reading, read_graph
from gradctl._derivatives._per_sample import per_sample_of
from gradctl._derivatives._per_sample_check import (
    coupled,
    coupled_module,
    flat,
    plain_gradient,
    row_facts,
    some_places,
    told_wrongly,
    tolerance,
    unequal,
)
from gradctl._derivatives._shares import shares_of
from gradctl._derivatives._weight_uses import Dense, Factors
from gradctl._errors import UsageError

# A mismatch below this can come from a few samples: a ReLU at zero may fall to either side.
_DOUBTFUL = 0.05


@dataclass(frozen=True, slots=True)
class Squares:
    """Squared norms of the shares of the batch, by parameter, and inner products with a direction if one was given."""

    norms: dict[str, Tensor]
    products: dict[str, Tensor]
    plan: Plan
    methods: dict[str, str]


@overload
def per_sample_norms(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    reduction: Reduction = "mean",
    per: Literal["sample"] = "sample",
    check: Check = "first",
    methods: dict[str, str] | None = None,
) -> Tensor: ...


@overload
def per_sample_norms(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    reduction: Reduction = "mean",
    per: Literal["parameter"],
    check: Check = "first",
    methods: dict[str, str] | None = None,
) -> dict[str, Tensor]: ...


def per_sample_norms(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    reduction: Reduction = "mean",
    per: Literal["sample", "parameter"] = "sample",
    check: Check = "first",
    methods: dict[str, str] | None = None,
) -> Tensor | dict[str, Tensor]:
    """Compute the norm of each sample's gradient without forming the gradients.

    One forward and the part of one backward that leads to the outputs of the layers. The weights are found in the
    graph, so that it does not matter which module uses them, or how often. What the graph does not show (operations
    without a rule) is formed per sample for these parameters alone; `methods` says which. Buffers, flags and `.grad`
    are left alone, random generators as one plain call of the model leaves them. A recurrent layer that runs as one
    fused operation is run again unfused; meanwhile oneDNN or cuDNN are off for the process.

    Args:
        model: a module; its parameters that take gradients count, a shared one once.
        loss_fn: called as `loss_fn(model(inputs), *targets)`; returns the loss of the batch, shape [].
        batch: as in `per_sample_grads`; every tensor has shape [B, ...].
        reduction: as in `per_sample_grads`.
        per: "sample" for the norm over all parameters, "parameter" for a dict of norms by parameter name.
        check: "first" compares two samples with plain autograd at the first call with these shapes, modes and loss,
            "always" at every call, "off" never.
        methods: a dict that is filled with how each parameter's norm was found.
    Returns:
        Euclidean norms, [B], or a dict of them by parameter name.
    Raises:
        NotPerSample: samples depend on each other (names the module), or an operation cannot be split by sample.
        UsageError: `reduction` is not what `loss_fn` does, or the batch has no rows.
    Source: Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015; Li et al. 2021,
        arXiv:2110.05679 (products of positions). Differs: the layers are read from the graph, not from modules.
    """
    model = require_module(model, "per_sample_norms")
    if reduction not in ("mean", "sum", "share"):
        raise UsageError(f"reduction is 'mean', 'sum' or 'share', got {reduction!r}")
    if per not in ("sample", "parameter"):
        raise UsageError(f"per is 'sample' or 'parameter', got {per!r}")
    if check not in ("first", "always", "off"):
        raise UsageError(f"check is 'first', 'always' or 'off', got {check!r}")
    rows = read_batch(batch)
    parameters = trained(model)
    refuse_batch_statistics(model)
    found = checked_squares(model, loss_fn, rows, parameters, reduction, check)
    if methods is not None:
        methods.update(found.methods)
    scale = rows.size if reduction == "mean" else 1
    if per == "parameter":
        return {name: found.norms[name].clamp(min=0).sqrt() * scale for name in parameters}
    return _total(found.norms).sqrt() * scale


def checked_squares(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    reduction: Reduction,
    check: Check,
    *,
    direction: Mapping[str, Tensor] | None = None,
) -> Squares:
    """Squared norms of the shares of the batch, checked against plain autograd as asked."""
    facts = memory(model)
    key = signature(model, loss_fn, rows, "norms", reduction)
    known: tuple[Plan | None, bool] = facts.get(key, (None, False))
    plan, held = known
    generators = Generators(parameters)
    found = squares(model, loss_fn, rows, parameters, plan, generators, reduction, direction=direction)
    if check == "always" or (check == "first" and not held):
        after = Generators(parameters)
        random = generators.moved()
        try:
            right = _audit(model, loss_fn, rows, parameters, reduction, found, generators, random=random)
        finally:
            after.put_back()
        if not right:
            # A rule of ours does not hold here: form the gradients, which is exact.
            generators.put_back()
            everything = dict.fromkeys(parameters, "plain autograd found other norms")
            plan = Plan(found.plan.kinds, {}, everything, found.plan.unfused, True, looped=True)
            found = squares(model, loss_fn, rows, parameters, plan, generators, reduction, direction=direction)
        held = True
    if found.plan.lasting:
        facts[key] = (found.plan, held)
    return found


def squares(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    plan: Plan | None,
    generators: Generators,
    reduction: Reduction,
    *,
    direction: Mapping[str, Tensor] | None = None,
) -> Squares:
    """Squared norms of every sample's share of the gradient of the batch, by parameter."""
    read = read_graph(model, loss_fn, rows, parameters, plan, generators, in_order=direction is not None)
    zeros = next(iter(parameters.values())).new_zeros(rows.size)
    if read is None:
        unused = dict.fromkeys(parameters, zeros)
        return Squares(unused, unused, Plan(0, {}, {}, False, False), dict.fromkeys(parameters, "unused"))
    norms: dict[str, Tensor] = {}
    inner: dict[str, Tensor] = {}
    methods: dict[str, str] = {}
    with torch.no_grad():
        for name, parts in read.parts.items():
            goal = direction[name] if direction is not None else None
            norms[name], inner[name] = _combined(parts, goal, zeros)
            methods[name] = _told(parts)
    if read.shares is not None:
        formed = _formed(model, loss_fn, rows, parameters, read, reduction, generators)
        for name, value in formed.items():
            rows_of = value.flatten(1).float() if value.element_size() <= 2 else value.flatten(1)
            norms[name] = rows_of.abs().square().sum(1)
            if direction is not None:
                inner[name] = rows_of @ direction[name].flatten().to(rows_of.dtype)
            methods[name] = f"formed ({read.others.get(name, 'random masks')})"
    return Squares(norms, inner, read.plan, methods)


def _formed(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    read: Reading,
    reduction: Reduction,
    generators: Generators,
) -> dict[str, Tensor]:
    """Per-sample gradients of the parameters without a rule; of all when the model draws random masks."""
    after = Generators(parameters)
    # With masks, the norms of two forwards would be of two different networks.
    wanted = dict(parameters) if generators.moved() else {name: parameters[name] for name in read.others}
    shares = read.shares if reduction == "share" else None
    generators.put_back()
    try:
        found, _, _ = per_sample_of(
            model, loss_fn, rows, wanted, shares=shares, start="loop" if read.plan.looped else "vmap"
        )
    finally:
        after.put_back()
    return {name: value / rows.size for name, value in found.items()} if reduction == "mean" else found


def _combined(parts: Parts, direction: Tensor | None, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norm and inner product with a direction, [B] each."""
    norm = inner = zeros
    for some in parts.values():
        dense = [part.rows for part in some if isinstance(part, Dense)]
        factors = [part for part in some if isinstance(part, Factors)]
        if dense:
            total = dense[0] if len(dense) == 1 else torch.stack(dense).sum(0)
            total = total.float() if total.element_size() <= 2 else total
            norm = norm + torch.linalg.vector_norm(total, dim=1).square()
            if direction is not None:
                inner = inner + total @ direction.flatten().to(total.dtype)
        else:
            norm = norm + squared_norms(factors)
            if direction is not None:
                wide = torch.promote_types(factors[0].right.dtype, torch.float32)
                inner = inner + products(factors, direction.flatten(1).to(wide))
    return norm, inner


def _told(parts: Parts) -> str:
    if not parts:
        return "zero"
    kinds = {type(part) for some in parts.values() for part in some}
    return "rows" if kinds == {Dense} else "outer products"


def _total(norms: Mapping[str, Tensor]) -> Tensor:
    wide = [value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for value in norms.values()]
    return torch.stack(wide).sum(0).clamp(min=0)


def _audit(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    reduction: Reduction,
    found: Squares,
    generators: Generators,
    *,
    random: bool,
) -> bool:
    """Hold the first and the last sample against plain autograd.

    Returns:
        False when the norms are wrong although samples are independent and the loss is reduced as was said.
    Raises:
        NotPerSample: samples depend on each other.
        UsageError: the loss is not reduced as was said.
    """
    if random:
        # Masks differ between a batch and a sample alone; whether the rules hold does not depend on them.
        with evaluated(model):
            quiet = Generators(parameters)
            again = squares(model, loss_fn, rows, parameters, None, quiet, reduction)
            if quiet.moved():
                return True  # still drawing: nothing that could be compared
            return _audit(model, loss_fn, rows, parameters, reduction, again, quiet, random=False)
    strict = 5 * tolerance(parameters)
    norms = _total(found.norms).sqrt()
    judged = _distances(model, loss_fn, rows, parameters, reduction, norms, sorted({0, rows.size - 1}))
    if not any(one.rule > strict for one in judged):
        return True
    if max(one.rule for one in judged) < _DOUBTFUL:
        judged = _distances(model, loss_fn, rows, parameters, reduction, norms, some_places(rows.size))
        if 2 * sum(one.rule <= strict for one in judged) > len(judged):
            return True
    module = coupled_module(model, loss_fn, rows, generators)
    if module is not None:
        raise coupled(module)
    if reduction != "share" and all(one.said > strict for one in judged):
        if all(one.other < max(strict, 1e-3) for one in judged):
            right = "sum" if reduction == "mean" else "mean"
            raise told_wrongly(reduction, "sums" if right == "sum" else "averages", right)
        if not _loss_takes_parameters(model, loss_fn, rows, parameters):
            raise unequal(max(one.said for one in judged))
    return False


@dataclass(frozen=True, slots=True)
class _Distance:
    """Relative errors for one sample.

    Args:
        rule: of the norm against plain autograd of the sample alone, or of its share when that was asked for.
        said: of its share against its gradient alone, reduced as was said.
        other: the same, reduced in the other way.
    """

    rule: float
    said: float
    other: float


def _loss_takes_parameters(model: nn.Module, loss_fn: LossFn, rows: Batch, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the loss depends on parameters by another way than the outputs: a penalty on weights."""
    values = list(parameters.values())
    with torch.enable_grad():
        outputs, loss = call(model, loss_fn, rows)
        shares = shares_of(outputs, loss, rows.size, retain_graph=True)
        whole = flat(plain_gradient(loss, values, retain_graph=True))
        through = flat(plain_gradient(shares.weigh(outputs, shares.values), values))
    return bool((whole - through).norm() > 20 * tolerance(parameters) * whole.norm())


def _distances(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    reduction: Reduction,
    norms: Tensor,
    places: list[int],
) -> list[_Distance]:
    floor = 1e-3 * float(norms.max())
    judged: list[_Distance] = []
    for place, fact in row_facts(model, loss_fn, rows, parameters, places).items():
        alone = fact.alone / (rows.size if reduction == "mean" else 1)
        goal = fact.share if reduction == "share" else alone
        swapped = alone * rows.size if reduction == "mean" else alone / rows.size
        scale = max(float(fact.share.norm()), floor)
        if scale == 0 or not bool(torch.isfinite(alone).all()):
            continue
        judged.append(
            _Distance(
                rule=abs(float(norms[place]) - float(goal.norm())) / scale,
                said=float((alone - fact.share).norm()) / scale,
                other=float((swapped - fact.share).norm()) / scale,
            )
        )
    return judged
