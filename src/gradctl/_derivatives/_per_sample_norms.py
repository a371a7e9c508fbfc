"""Norms of per-sample gradients from what the layers saw, without forming the gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradctl._derivatives._batch import (
    Batch,
    Check,
    Generators,
    LossFn,
    Reduction,
    call,
    evaluated,
    memory,
    output_tensors,
    read_batch,
    refuse_batch_statistics,
    require_module,
    signature,
    trained,
)
from gradctl._derivatives._factor_norms import products, squared_norms
from gradctl._derivatives._per_sample import Shares, per_sample_of, plain_gradient, shares_of
from gradctl._derivatives._per_sample_check import coupled, coupled_module, told_wrongly, tolerance, unequal
from gradctl._derivatives._row_owners import Layout, digits, find_layout
from gradctl._derivatives._weight_uses import Dense, Factors, Rows, Use, find_uses
from gradctl._errors import UsageError

# Below this a mismatch in float32 is looked at again in float64: a ReLU at zero may fall to either side.
_DOUBTFUL = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """What the first call with a signature learnt.

    Args:
        kinds: the structure of the graph.
        layouts: for each parameter, the layout of the rows of each of its uses.
        others: parameters whose gradients are formed instead, and the operation because of which.
        unfused: whether recurrent layers run as single operations.
        lasting: whether it holds for later calls; not when rows were zero whose owner could not be seen.
    """

    kinds: int
    layouts: dict[str, list[Layout]]
    others: dict[str, str]
    unfused: bool
    lasting: bool


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
    found = squares(model, loss_fn, rows, parameters, plan, generators, direction=direction)
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
            everything = dict.fromkeys(parameters, "the rules disagreed with plain autograd")
            plan = Plan(found.plan.kinds, {}, everything, found.plan.unfused, True)
            found = squares(model, loss_fn, rows, parameters, plan, generators, direction=direction)
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
    *,
    direction: Mapping[str, Tensor] | None = None,
) -> Squares:
    """Squared norms of every sample's share of the gradient of the batch, by parameter."""
    unfused = plan is not None and plan.unfused
    with torch.enable_grad(), _without_fused_layers(unfused):
        outputs, loss = call(model, loss_fn, rows)
        if not loss.requires_grad:
            zeros = {name: loss.new_zeros(rows.size) for name in parameters}
            return Squares(zeros, zeros, Plan(0, {}, {}, False, False), dict.fromkeys(parameters, "unused"))
        uses = find_uses(loss, parameters)
        if uses.fused_rnn and uses.others and not unfused:
            generators.put_back()
            again = Plan(0, {}, {}, True, True)
            return squares(model, loss_fn, rows, parameters, again, generators, direction=direction)
        if any(value.is_complex() for value in parameters.values()):
            uses = type(uses)({}, dict.fromkeys(parameters, "complex numbers"), False, uses.kinds)
        if plan is None or plan.kinds != uses.kinds:
            plan = _learn(outputs, uses.by_name, uses.others, uses.kinds, rows.size, unfused=unfused)
        others = dict(plan.others)
        if direction is not None:
            parts = (name for name, some in uses.by_name.items() if any(use.route for use in some))
            others |= dict.fromkeys(parts, "a product with a part of a weight")
        taken = {name: some for name, some in uses.by_name.items() if name not in others}
        edges = {id(use.node): GradientEdge(use.node, 0) for some in taken.values() for use in some}
        shares = shares_of(outputs, loss, rows.size, retain_graph=True) if others else None
        found = torch.autograd.grad(loss, list(edges.values()), allow_unused=True) if edges else ()
    gradients = dict(zip(edges, found, strict=True))
    norms: dict[str, Tensor] = {}
    inner: dict[str, Tensor] = {}
    methods: dict[str, str] = {}
    with torch.no_grad():
        for name, some in taken.items():
            parts = _by_sample(some, gradients, plan.layouts[name])
            goal = direction[name] if direction is not None else None
            norms[name], inner[name] = _combined(parts, goal, loss.new_zeros(rows.size))
            methods[name] = _told(parts)
    if shares is not None:
        formed = _formed(model, loss_fn, rows, parameters, others, shares, generators)
        for name, value in formed.items():
            flat = value.flatten(1)
            norms[name] = flat.abs().square().sum(1)
            if direction is not None:
                inner[name] = flat @ direction[name].flatten().to(flat.dtype)
            methods[name] = f"formed ({others.get(name, 'random masks')})"
    return Squares(norms, inner, plan, methods)


def _formed(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    others: Mapping[str, str],
    shares: Shares,
    generators: Generators,
) -> dict[str, Tensor]:
    """Per-sample gradients of the parameters without a rule; of all when the model draws random masks."""
    after = Generators(parameters)
    draws = generators.moved()
    # With masks, the norms of two forwards would be of two different networks.
    wanted = dict(parameters) if draws else {name: parameters[name] for name in others}
    generators.put_back()
    try:
        return per_sample_of(model, loss_fn, rows, wanted, shares=shares)[0]
    finally:
        after.put_back()


def _learn(
    outputs: Any, by_name: Mapping[str, list[Use]], others: Mapping[str, str], kinds: int, size: int, *, unfused: bool
) -> Plan:
    """Find out which rows of each use belong to which sample, by backwards from weighted outputs."""
    others = dict(others)
    flat = [use for some in by_name.values() for use in some]
    if size == 1 or not flat:
        layouts = {name: [Layout("samples first", size)] * len(some) for name, some in by_name.items()}
        return Plan(kinds, layouts, others, unfused, True)
    tensors = [one for one in output_tensors(outputs) if one.dim() and one.shape[0] == size and one.requires_grad]
    if not tensors:
        return Plan(kinds, {}, dict.fromkeys([*by_name, *others], "outputs without rows"), unfused, True)
    # Fixed numbers without a zero: every row that leads to an output is seen, and no generator is touched.
    seeds = [torch.cos(torch.arange(t.numel(), device=t.device) * 0.7390851 + 0.1).reshape(t.shape).to(t.dtype)
             for t in tensors]
    edges = {id(use.node): GradientEdge(use.node, 0) for use in flat}
    keys = list(edges)

    def pulled(weights: Tensor | None) -> dict[int, Tensor | None]:
        given = seeds
        if weights is not None:
            given = [s * weights.to(s).reshape(-1, *[1] * (s.dim() - 1)) for s in seeds]
        found = torch.autograd.grad(tensors, list(edges.values()), given, retain_graph=True, allow_unused=True)
        return dict(zip(keys, found, strict=True))

    plain = pulled(None)
    dtypes = [one.dtype for one in plain.values() if one is not None]
    lowest = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)
    numbers = digits(size, lowest)
    weighted = [pulled(weights) for weights in numbers.factors]
    layouts: dict[str, list[Layout]] = {}
    lasting = True
    known: dict[tuple[int, int], Layout | None] = {}
    for name, some in by_name.items():
        mine: list[Layout] = []
        for use in some:
            gradient = plain[id(use.node)]
            if gradient is None or not bool(gradient.any()):
                lasting = False
                mine.append(Layout("unseen", size))
                continue
            first = use.rows(gradient).gradient
            place = (id(use.node), first.shape[0])
            if place not in known:
                several = [use.rows(one).gradient for w in weighted if (one := w[id(use.node)]) is not None]
                known[place] = find_layout(first, several, size, numbers.base)
            layout = known[place]
            if layout is None:
                others[name] = "rows that belong to several samples"
                break
            mine.append(layout)
        if name not in others:
            layouts[name] = mine
            seen = [_turned(use, use.rows(one)) for use in some if (one := plain[id(use.node)]) is not None]
            if not combinable(seen):
                others[name] = "uses of different kinds"
    return Plan(kinds, layouts, others, unfused, lasting)


def _turned(use: Use, rows: Rows) -> Rows:
    """The rows in the orientation of the weight itself."""
    if not use.flip or isinstance(rows, Dense) or not rows.left.is_floating_point():
        return rows
    return Factors(rows.right, rows.left, "left" if rows.moving == "right" else "right", rows.groups)


def _by_sample(
    some: list[Use], gradients: Mapping[int, Tensor | None], layouts: list[Layout]
) -> dict[tuple[object, ...], list[Rows]]:
    """The rows of all uses of a weight, [B, K, ...], by the part of the weight that they see."""
    found: dict[tuple[object, ...], list[Rows]] = {}
    for use, layout in zip(some, layouts, strict=True):
        gradient = gradients[id(use.node)]
        if gradient is None or layout.order == "unseen":
            continue
        rows = _turned(use, use.rows(gradient))
        if isinstance(rows, Dense):
            placed = layout.apply(rows.rows)
            made: Rows = Dense(placed[:, 0] if placed.shape[1] == 1 else placed.sum(1))
        else:
            left, right = layout.apply(rows.left).flatten(1, 2), layout.apply(rows.right).flatten(1, 2)
            made = Factors(left, right, rows.moving, rows.groups)
        found.setdefault(use.route, []).append(made)
    return found


def _combined(
    parts: dict[tuple[object, ...], list[Rows]], direction: Tensor | None, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared norm and inner product with a direction, [B] each."""
    norm = inner = zeros
    for some in parts.values():
        dense = [part.rows for part in some if isinstance(part, Dense)]
        factors = [part for part in some if isinstance(part, Factors)]
        if dense:
            total = dense[0] if len(dense) == 1 else torch.stack(dense).sum(0)
            norm = norm + total.square().sum(1)
            if direction is not None:
                inner = inner + total @ direction.flatten().to(total.dtype)
        else:
            norm = norm + squared_norms(factors)
            if direction is not None:
                inner = inner + products(factors, direction.flatten(1).to(factors[0].right.dtype))
    return norm, inner


def _told(parts: dict[tuple[object, ...], list[Rows]]) -> str:
    if not parts:
        return "zero"
    kinds = {type(part) for some in parts.values() for part in some}
    return "rows" if kinds == {Dense} else "outer products"


def _total(norms: Mapping[str, Tensor]) -> Tensor:
    wide = [value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for value in norms.values()]
    return torch.stack(wide).sum(0).clamp(min=0)


@contextlib.contextmanager
def _without_fused_layers(off: bool) -> Iterator[None]:
    """Let recurrent layers run as single operations, whose weights the graph shows."""
    if not off:
        yield
        return
    onednn = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = onednn


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
    limit: float | None = None,
) -> bool:
    """Hold the first and the last sample against plain autograd.

    Returns:
        False when the rules were wrong about the share of a sample although samples are independent.
    Raises:
        NotPerSample: samples depend on each other.
        UsageError: the loss is not reduced as was said.
    """
    if random:
        # Masks differ between a batch and a sample alone; whether the rules hold does not depend on them.
        with evaluated(model):
            quiet = Generators(parameters)
            again = squares(model, loss_fn, rows, parameters, None, quiet)
            if quiet.moved():
                return True  # still drawing: nothing that could be compared
            return _audit(model, loss_fn, rows, parameters, reduction, again, quiet, random=False)
    strict = 5 * tolerance(parameters) if limit is None else limit
    rule, said, other = _distances(model, loss_fn, rows, parameters, reduction, found)
    worst = max(rule, said)
    if not worst > strict:
        return True
    module = coupled_module(model, loss_fn, rows, generators)
    if module is not None:
        raise coupled(module)
    if limit is None and worst < _DOUBTFUL:
        wide = _in_double(model, rows)
        if wide is not None:
            copied, leaves, values = wide
            try:
                again = squares(copied, loss_fn, leaves, values, None, generators)
                return _audit(
                    copied, loss_fn, leaves, values, reduction, again, generators, random=False, limit=1e-6
                )
            except UsageError:
                raise
            except (RuntimeError, TypeError, NotImplementedError):
                pass  # a loss with float32 weights, or a kernel without float64: only what rounding cannot do counts
        if not worst > 1e-3:
            return True
    if said > strict:
        right: str = "sum" if reduction == "mean" else "mean"
        if reduction != "share" and other < max(strict, 1e-3):
            raise told_wrongly(reduction, "sums" if right == "sum" else "averages", right)
        if reduction != "share":
            raise unequal(said)
    return not rule > strict


def _distances(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    reduction: Reduction,
    found: Squares,
) -> tuple[float, float, float]:
    """Of two samples the worst relative errors.

    Returns:
        That of the norm against the share of the batch by plain autograd; that of this share against the gradient of
        the sample alone, reduced as was said; and reduced in the other way.
    """
    values = list(parameters.values())
    norms = _total(found.norms).sqrt()
    floor = 1e-3 * float(norms.max())
    worst = [0.0, 0.0, 0.0]
    with torch.enable_grad():
        outputs, loss = call(model, loss_fn, rows)
        if not loss.requires_grad:
            return 0.0, 0.0, 0.0
        shares = shares_of(outputs, loss, rows.size)
        for index in sorted({0, rows.size - 1}):
            outputs, loss = call(model, loss_fn, rows.row(index))
            weighed = shares.weigh(outputs, [value[index : index + 1] for value in shares.values])
            share = _flat(plain_gradient(weighed, values, retain_graph=True))
            alone = _flat(plain_gradient(loss, values))
            scale = max(float(share.norm()), floor)
            if scale == 0 or not torch.isfinite(alone).all():
                continue
            by = rows.size if reduction == "mean" else 1
            swapped = 1 if reduction == "mean" else rows.size
            worst[0] = max(worst[0], abs(float(norms[index]) - float(share.norm())) / scale)
            if reduction != "share":
                worst[1] = max(worst[1], float((alone / by - share).norm()) / scale)
                worst[2] = max(worst[2], float((alone / swapped - share).norm()) / scale)
    return worst[0], worst[1], worst[2]


def _flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in grads])


def _in_double(model: nn.Module, rows: Batch) -> tuple[nn.Module, Batch, dict[str, Tensor]] | None:
    try:
        wide = copy.deepcopy(model).double().eval()
    except (RuntimeError, TypeError, copy.Error):
        return None
    leaves = [leaf.double() if leaf.is_floating_point() else leaf for leaf in rows.leaves()]
    parameters = {name: value for name, value in wide.named_parameters() if value.requires_grad}
    return wide, rows.replaced(leaves, rows.size), dict[str, Tensor](parameters)


def combinable(parts: list[Rows]) -> bool:
    """Whether the rows of several uses of one weight add up in one form."""
    if len(parts) < 2:
        return True
    dense = [part for part in parts if isinstance(part, Dense)]
    if dense:
        return len(dense) == len(parts) and len({part.rows.shape[1] for part in dense}) == 1
    factors = [part for part in parts if isinstance(part, Factors)]
    tall = {part.left.shape[2] for part in factors if part.left.is_floating_point()}
    return len(tall) <= 1 and len({(part.right.shape[2], part.groups) for part in factors}) == 1
