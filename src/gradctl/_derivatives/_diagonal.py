"""The exact diagonal of a Hessian: propagated through the layers, or by products with unit vectors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradctl._derivatives._forward import bound, run, scalar
from gradctl._derivatives._graph import differentiate, plain_arithmetic, walk
from gradctl._derivatives._layers import Plan, planned
from gradctl._derivatives._operators import HessianOperator, Loss
from gradctl._derivatives._used import Unused, hold_used
from gradctl._derivatives._variables import Variables, Wanted, variables
from gradctl._errors import NoSecondDerivative, UsageError

DiagonalMethod = Literal["auto", "propagation", "products", "products-loop"]
_CHUNK_BYTES = 64 << 20


def hessian_diagonal(loss: Loss, params: Wanted, *, method: DiagonalMethod = "auto", unused: Unused = "zeros") -> Any:
    """Return the diagonal of the Hessian of a loss, exactly.

    "propagation" carries, for each sample, a root of the loss's Hessian backward through the layers and adds the
    squares; where a smooth activation bends, its curvature too. It needs a network of linear, convolution, pooling and
    elementwise layers whose first dim is the batch (BatchNorm in evaluation mode and frozen), each parameter used once,
    and costs about one backward for each output and for each unit of a smooth activation. "products" multiplies with
    each unit vector, many at once: any loss, one product for each element of the parameters.

    There is no random estimate: Hutchinson's is off by its own size after 10 probes and by 40 % after 1,000.

    Args:
        loss: as for `hvp`; a function is run once.
        params: as for `hvp`.
        method: "auto" propagates where the graph allows it and that takes fewer backwards; "propagation" refuses with
            the operation that stands against it; "products-loop" multiplies one by one.
        unused: as for `hvp`.
    Returns:
        The diagonal in the structure of `params`.
    Raises:
        NoSecondDerivative: an operation of the graph has no derivative of its backward.
        UsageError: the graph does not allow the method that was asked for; names the operation.
    Source: Dangel et al. 2020, BackPACK, arXiv:1912.10985. Differs: read from autograd's graph, not from modules.
    """
    own = not isinstance(loss, Tensor)
    function, of = bound(loss, params, called="params") if own else (None, variables(params))
    value = scalar(run(function) if function is not None else loss)
    if method in ("auto", "propagation"):
        reached = walk([value], of.tensors)
        hold_used(reached, of, unused, what="loss")
        plan = planned(value, of)
        if isinstance(plan, Plan) and (method != "auto" or plan.num_columns < of.numel):
            try:
                with plain_arithmetic(of.device):
                    return of.pack(differentiate(lambda: _propagated(value, of, plan), again="the loss"))
            except NoSecondDerivative:
                if method != "auto":
                    raise  # no batching rule for one of the operations
        elif method == "propagation":
            raise UsageError(
                f"the diagonal cannot be propagated: {plan}",
                why="the rules know linear, convolution, pooling, normalisation and elementwise layers, used once",
                fix="take method='auto' or 'products'",
            )
    operator = HessianOperator(value, of.pack(of.tensors), unused=unused)
    return of.pack(_by_products(operator, of, loop=method == "products-loop"))


def _by_products(operator: HessianOperator, of: Variables, *, loop: bool) -> list[Tensor]:
    """Multiply with every unit vector and keep one element of each product."""
    live = set(operator._live)
    itemsize = of.tensors[0].element_size()
    found: list[Tensor] = []
    for place, tensor in enumerate(of.tensors):
        number = operator._used.index(place) if place in operator._used else -1
        if number not in live:
            found.append(torch.zeros_like(tensor))
            continue
        gradient, size = operator._gradients[number], tensor.numel()
        at_once = max(1, min(size, _CHUNK_BYTES // (itemsize * max(1, of.numel))))
        diagonal = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
        for start in range(0, size, at_once):
            count = min(at_once, size - start)
            diagonal[start : start + count] = _some(gradient, tensor, start, count, loop=loop)
        found.append(diagonal.view(tensor.shape))
    return found


def _some(gradient: Tensor, tensor: Tensor, start: int, count: int, *, loop: bool) -> Tensor:
    units = torch.zeros(count, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    rows = torch.arange(count, device=tensor.device)
    units[rows, rows + start] = 1
    units = units.view(count, *tensor.shape)

    def times(v: Tensor, *, batched: bool) -> Tensor:
        (found,) = differentiate(
            lambda: torch.autograd.grad(
                gradient, tensor, v, retain_graph=True, allow_unused=True, is_grads_batched=batched
            ),
            again="the operator",
        )
        return torch.zeros_like(v) if found is None else found

    if not loop and count > 1:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return times(units, batched=True).reshape(count, -1)[rows, rows + start]
        except RuntimeError:
            pass  # an operation without a batching rule
    return torch.stack([times(unit, batched=False).reshape(-1)[start + row] for row, unit in enumerate(units)])


def _propagated(loss: Tensor, of: Variables, plan: Plan) -> list[Tensor]:
    """Add up the squares of what each source of curvature sends to each layer."""
    totals = [torch.zeros_like(tensor) for tensor in of.tensors]
    places = {id(tensor): number for number, tensor in enumerate(of.tensors)}
    layers = [GradientEdge(use.node, 0) for use in plan.uses]

    def spread(edge: GradientEdge, columns: Tensor, weights: Tensor | None) -> None:
        """Send columns [k, B, ...] from an edge; `weights` [k, B] are the curvatures, ones when left out."""
        width = max(1, max(use.numel_of_output for use in plan.uses))
        at_once = max(1, min(len(columns), _CHUNK_BYTES // (columns.element_size() * width)))
        for start in range(0, len(columns), at_once):
            some = columns[start : start + at_once]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                sent = _sent(edge, layers, some)
            for use, delta in zip(plan.uses, sent, strict=True):
                if delta is not None:
                    weight = None if weights is None else weights[start : start + at_once]
                    for tensor, square in use.squares(delta, weight):
                        if id(tensor) in places:
                            totals[places[id(tensor)]] += square.view_as(tensor)

    roots, signs = plan.root_of_loss(loss)
    spread(plan.outputs, roots, signs)
    for bend in plan.bends:
        curvature = bend.curvature(loss)
        units = curvature[0].numel()
        eye = torch.eye(units, dtype=curvature.dtype, device=curvature.device)
        columns = eye.view(units, 1, *curvature.shape[1:]).expand(units, *curvature.shape)
        spread(bend.edge, columns, curvature.reshape(len(curvature), units).T)
    return totals


def _sent(edge: GradientEdge, layers: Sequence[GradientEdge], columns: Tensor) -> Sequence[Tensor | None]:
    """Return what columns at an edge send to the outputs of the layers; a layer's own output gets them as they are."""
    own = [(layer.node, layer.output_nr) == (edge.node, edge.output_nr) for layer in layers]
    below = [layer for layer, same in zip(layers, own, strict=True) if not same]
    found: list[Tensor | None] = []
    if below:
        found = list(
            cast(
                "Any",
                torch.autograd.grad(
                    cast("Any", [edge]),
                    below,
                    [columns],
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                ),
            )
        )
    rest = iter(found)
    return [columns if same else next(rest) for same in own]
