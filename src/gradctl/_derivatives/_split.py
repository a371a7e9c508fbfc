"""Where a loss parts from the network: the outputs between which and the loss the Gauss-Newton matrix is split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradctl._errors import UsageError

# Operations that pass a loss on linearly, when one of their inputs depends on the parameters.
_LINEAR = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("Mean", "Sum", "Div", "Mul", "Neg", "Add", "Sub", "NllLoss", "NllLoss2D", "KlDiv", "Where", "MaskedFill"),
        *("View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "Slice", "Index", "Gather"),
        *("Stack", "Cat", "ToCopy", "Alias", "T", "Transpose", "Permute", "Clone", "Expand"),
    )
    for number in (0, 1, 2)
)
_HEADS = frozenset(
    f"{name}Backward0"
    for name in (
        "LogSoftmax",
        "MseLoss",
        "BinaryCrossEntropyWithLogits",
        "SmoothL1Loss",
        "HuberLoss",
        "SoftMarginLoss",
        "LogSigmoid",
    )
)
_SEVERAL = frozenset(f"{name}Backward{number}" for name in ("Add", "Sub", "Stack", "Cat", "Where") for number in (0, 1))
_FIX = "pass outputs=, the tensors that the loss is computed from; a function returns (loss, outputs)"


def split(loss: Tensor, outputs: Sequence[Tensor] | None, tensors: Sequence[Tensor]) -> list[GradientEdge]:
    """Return the edges at which a graph is split into the loss above and the network below.

    Args:
        loss: one number, with its graph.
        outputs: what the loss is computed from; None to find it, for the losses that are known.
        tensors: the parameters: no path from the loss to them may pass by the outputs.
    Returns:
        At least one edge.
    Raises:
        UsageError: the outputs are not to be seen from the loss, or the loss reaches a parameter on another way.
    """
    if outputs is None:
        return _found(loss)
    edges = [get_gradient_edge(output) for output in outputs if output.requires_grad]
    if not edges:
        raise UsageError("none of the outputs has a history", fix="compute them from the parameters, with gradients on")
    _hold_to_pass(loss, edges, tensors)
    return edges


def softmax_head(loss: Tensor, edges: Sequence[GradientEdge]) -> Any:
    """Return the one log-softmax right above the outputs, from which a loss that is known goes on; or None."""
    node: Any = loss.grad_fn
    while node is not None and node.name() != "LogSoftmaxBackward0":
        live = [below for below, _ in node.next_functions if below is not None]
        node = live[0] if len(live) == 1 else None
    return node if node is not None and node.next_functions[0] == (edges[0].node, edges[0].output_nr) else None


def _found(loss: Tensor) -> list[GradientEdge]:
    found: dict[tuple[Any, int], GradientEdge] = {}
    queue: list[tuple[Any, int]] = [(loss.grad_fn, 0)]
    seen: set[tuple[Any, int]] = set()
    while queue:
        place = queue.pop()
        if place in seen:
            continue
        seen.add(place)
        node = place[0]
        name: str = node.name()
        live = [(below, number) for below, number in node.next_functions if below is not None]
        if name in _HEADS or _is_square(node, name):
            if len(live) == 1:
                found[live[0]] = GradientEdge(*live[0])
                continue
        elif name == "BinaryCrossEntropyBackward0" and len(live) == 1 and live[0][0].name() == "SigmoidBackward0":
            below = live[0][0].next_functions[0]
            found[below] = GradientEdge(*below)
            continue
        elif name in _LINEAR and (len(live) == 1 or name in _SEVERAL) and not _in_second(node, name):
            queue += live
            continue
        raise UsageError(
            "the outputs of the network are not to be seen from this loss",
            what=f"from the loss downward, {name.removesuffix('0')} is no loss that is known"
            if len(live) < 2
            else f"from the loss downward, several inputs of {name.removesuffix('0')} depend on the parameters",
            why="the Gauss-Newton matrix depends on where the loss ends and the network begins",
            fix=_FIX,
        )
    return list(found.values())


def _in_second(node: Any, name: str) -> bool:
    """Whether what depends on the parameters divides, or is the target of a divergence: not linear in it."""
    return name.startswith(("Div", "KlDiv")) and node.next_functions[0][0] is None


def _is_square(node: Any, name: str) -> bool:
    if name != "PowBackward0" or node._saved_exponent != 2:
        return False
    below = node.next_functions[0][0]
    return below is not None and below.name() in ("SubBackward0", "AddBackward0")


def _hold_to_pass(loss: Tensor, edges: Sequence[GradientEdge], tensors: Sequence[Tensor]) -> None:
    stops = {(edge.node, edge.output_nr) for edge in edges}
    wanted = {id(tensor) for tensor in tensors}
    places = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    queue: list[tuple[Any, int]] = [(loss.grad_fn, 0)]
    seen: set[Any] = set()
    met = False
    while queue:
        node, number = queue.pop()
        if (node, number) in stops:
            met = True
            continue
        if node in seen:
            continue
        seen.add(node)
        if node in places or (node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) in wanted):
            raise UsageError(
                "a part of this loss reaches the parameters without passing the outputs",
                what="a penalty on the parameters, or a second network in the loss",
                why="the Gauss-Newton matrix of the outputs would leave it out in silence",
                fix="name every output that the loss is computed from, and add the Hessian of a penalty yourself",
            )
        queue += [(below, at) for below, at in node.next_functions if below is not None]
    if not met:
        raise UsageError("the loss was not computed from these outputs", fix=_FIX)
