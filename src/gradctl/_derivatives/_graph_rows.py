"""The rows of every weight's gradient, by sample, read from one graph."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradctl._derivatives._batch import Batch, Generators, LossFn, call, output_tensors
from gradctl._derivatives._per_sample_check import refuse_reentrant
from gradctl._derivatives._row_owners import Layout, digits, find_layout
from gradctl._derivatives._shares import Shares, shares_of
from gradctl._derivatives._weight_uses import Dense, Factors, Rows, Use, find_uses

# Rows of one weight, [B, K, ...], by the part of it that they belong to.
Parts = dict[tuple[object, ...], list[Rows]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the first call with a signature learnt.

    Args:
        kinds: the structure of the graph.
        layouts: for each parameter, the layout of the rows of each of its uses.
        others: parameters whose gradients are formed instead, and the operation because of which.
        unfused: whether recurrent layers run as single operations.
        lasting: whether it holds for later calls; not when rows were zero whose owner could not be seen.
        looped: whether the gradients of the others are formed one sample at a time.
    """

    kinds: int
    layouts: dict[str, list[Layout]]
    others: dict[str, str]
    unfused: bool
    lasting: bool
    looped: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What one forward and backward have shown.

    Args:
        parts: the rows of each weight that is understood.
        others: the other parameters, and the operation because of which.
        plan: what was learnt.
        shares: the gradient of the outputs, when there are others.
    """

    parts: dict[str, Parts]
    others: dict[str, str]
    plan: Plan
    shares: Shares | None


def read_graph(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: Mapping[str, Tensor],
    plan: Plan | None,
    generators: Generators,
    *,
    in_order: bool = False,
    scale: float = 1.0,
) -> Reading | None:
    """Run the model once and read the rows of each sample's share of the gradient; None when nothing is differentiable.

    Args:
        model: the model.
        loss_fn: its loss.
        rows: the batch.
        parameters: what is differentiated, by name.
        plan: what an earlier call has learnt.
        generators: as they were before; they are put back when the model must run again.
        in_order: leave out weights of which parts are used, or whose elements come in another order.
        scale: a factor for the loss.
    """
    unfused = plan is not None and plan.unfused
    with torch.enable_grad(), _without_fused_layers(unfused):
        outputs, loss = call(model, loss_fn, rows)
        if not loss.requires_grad:
            return None
        refuse_reentrant(loss)
        uses = find_uses(loss, parameters, rows.size)
        if uses.fused_rnn and uses.others and not unfused:
            generators.put_back()
            again = Plan(0, {}, {}, True, True)
            return read_graph(model, loss_fn, rows, parameters, again, generators, in_order=in_order, scale=scale)
        if any(value.is_complex() for value in parameters.values()):
            uses = type(uses)({}, dict.fromkeys(parameters, "complex numbers"), False, uses.kinds)
        if plan is None or plan.kinds != uses.kinds:
            plan = _learn(outputs, uses.by_name, uses.others, uses.kinds, rows.size, unfused=unfused)
        others = dict(plan.others)
        if in_order:
            parts = (name for name, some in uses.by_name.items() if not all(use.in_order for use in some))
            others |= dict.fromkeys(parts, "a part of a weight")
        taken = {name: some for name, some in uses.by_name.items() if name not in others}
        edges = {id(use.node): GradientEdge(use.node, 0) for some in taken.values() for use in some}
        shares = shares_of(outputs, loss, rows.size, retain_graph=True) if others else None
        start = None if scale == 1 else loss.new_tensor(scale)
        found = torch.autograd.grad(loss, list(edges.values()), start, allow_unused=True) if edges else ()
    gradients = dict(zip(edges, found, strict=True))
    with torch.no_grad():
        split = {name: _by_sample(some, gradients, plan.layouts[name]) for name, some in taken.items()}
    return Reading(split, others, plan, shares)


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
    seeds = [
        torch.cos(torch.arange(t.numel(), device=t.device) * 0.7390851 + 0.1).reshape(t.shape).to(t.dtype)
        for t in tensors
    ]
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
            seen: dict[tuple[object, ...], list[Rows]] = {}
            for use in some:
                if (one := plain[id(use.node)]) is not None:
                    seen.setdefault(use.route, []).append(_turned(use, use.rows(one)))
            lifted = [use.looked_up is not None for use in some]
            if not all(combinable(part) for part in seen.values()) or (any(lifted) and not all(lifted)):
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
            if use.looked_up is not None:
                index = use.looked_up.flatten().expand(layout.size, -1)
                made = Factors(index, made.rows.reshape(*index.shape, -1), "right")
        else:
            left, right = layout.apply(rows.left).flatten(1, 2), layout.apply(rows.right).flatten(1, 2)
            made = Factors(left, right, rows.moving, rows.groups)
        found.setdefault(use.route, []).append(made)
    return found


@contextlib.contextmanager
def _without_fused_layers(off: bool) -> Generator[None]:
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
