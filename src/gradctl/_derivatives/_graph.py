"""What a graph holds that has no second derivative, or a wrong one; found before anything is computed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gradctl._errors import GradctlError, NoSecondDerivative, UsageError

Node = Any  # torch.autograd.graph.Node: what it has depends on the operation
CALLABLE = "pass a function that computes the loss: it is run with the math backend of attention"


@dataclass(frozen=True, slots=True)
class Reached:
    """The nodes of a graph by the names of their operations, and which of the wanted tensors they lead to."""

    nodes: dict[str, list[Node]]
    used: tuple[bool, ...]

    def has(self, *prefixes: str) -> bool:
        """Whether the name of an operation begins so."""
        return any(name.startswith(prefixes) for name in self.nodes)


def walk(roots: Sequence[Tensor], tensors: Sequence[Tensor]) -> Reached:
    """Find every node below `roots`, and which of `tensors` are reached."""
    places = [tensor.grad_fn for tensor in tensors]
    queue = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Node] = set(queue)
    leaves = {id(root) for root in roots}
    nodes: dict[str, list[Node]] = {}
    while queue:
        node: Node = queue.pop()
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":
            leaves.add(id(node.variable))
            continue
        nodes.setdefault(name, []).append(node)
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                queue.append(below)
    used = tuple(
        id(tensor) in leaves if place is None else place in seen for tensor, place in zip(tensors, places, strict=True)
    )
    return Reached(nodes, used)


def leads_to(node: Node, tensors: Sequence[Tensor]) -> bool:
    """Whether a gradient that passes `node` reaches one of `tensors`."""
    wanted = {id(tensor) for tensor in tensors}
    places = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    queue, seen = [node], {node}
    while queue:
        at = queue.pop()
        if at in places or (at.name() == "torch::autograd::AccumulateGrad" and id(at.variable) in wanted):
            return True
        for below, _ in at.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                queue.append(below)
    return False


def refuse_no_second_derivative(reached: Reached, tensors: Sequence[Tensor]) -> None:
    """Refuse a graph with an operation whose backward has no derivative, or one that drops terms in silence.

    Raises:
        NoSecondDerivative: names the operation, and what has a second derivative instead.
    """
    for name, nodes in reached.nodes.items():
        for node in nodes:
            found = _fault(node, name)
            if found is None and name != "EmbeddingBackward0" and not hasattr(node, "_forward_cls"):
                break  # one operation of torch's own speaks for all of its name
            if found is not None and leads_to(node, tensors):
                raise found


def notes_of(reached: Reached, tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """Say what a product through this graph holds constant."""
    found = (
        f"row {_padding(node)} of an embedding is its padding: held constant, as its gradient is always zero"
        for node in reached.nodes.get("EmbeddingBackward0", ())
        if _padding(node) is not None and leads_to(node, tensors)
    )
    return tuple(dict.fromkeys(found))


def _padding(node: Node) -> int | None:
    padding = int(node._saved_padding_idx)
    return padding if 0 <= padding < 1 << 62 else None


def _fault(node: Node, name: str) -> NoSecondDerivative | None:
    if name.startswith("ScaledDotProduct"):
        return NoSecondDerivative(
            f"{name.removesuffix('Backward0')} has no second derivative",
            what="the loss was computed with a fused attention kernel",
            why="torch has no derivative of its backward",
            fix=f"{CALLABLE}; or compute the loss under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
        )
    if name.startswith("EmbeddingBagBackward") or name.startswith("CtcLossBackward"):
        operation = "embedding_bag" if name.startswith("Emb") else "ctc_loss"
        return NoSecondDerivative(
            f"{operation} has no second derivative",
            why="torch has no derivative of its backward",
            fix="look the rows up with embedding and add them: (weight[index]).sum(1)"
            if operation == "embedding_bag"
            else "there is no form of it in torch that has one",
        )
    if name.startswith("EmbeddingBackward") and getattr(node, "_saved_sparse", False):
        return NoSecondDerivative(
            "embedding(sparse=True) has no second derivative",
            why="its gradient is a sparse tensor, whose derivative torch does not have",
            fix="build the embedding with sparse=False",
        )
    if name == "WeightNormInterfaceBackward0":
        return NoSecondDerivative(
            "weight_norm has a wrong second derivative",
            why="the derivative of torch's fused backward is wrong (seen in 2.13 on CPU; gradgradcheck fails)",
            fix="write the weight as g * v / v.norm(2, dim, keepdim=True) in a parametrization of your own",
        )
    if name == "CompiledFunctionBackward":
        return NoSecondDerivative(
            "a compiled function has no second derivative",
            why="torch.compile traces forward and backward, not the derivative of the backward",
            fix="compute the loss with the module that was given to torch.compile",
        )
    if name == "CheckpointFunctionBackward":
        return NoSecondDerivative(
            "checkpoint(use_reentrant=True) has no second derivative",
            why="its backward builds a graph of its own, which cannot be differentiated",
            fix="pass use_reentrant=False to checkpoint",
        )
    return _custom_fault(node, name)


def _custom_fault(node: Node, name: str) -> NoSecondDerivative | None:
    """Judge a Function of the caller's: one that drops terms of a second derivative gives no error of its own."""
    function = getattr(node, "_forward_cls", None)
    if function is None:
        return None
    if _once_differentiable(function):
        return NoSecondDerivative(
            f"{function.__name__} has no second derivative",
            what=f"its backward is marked once_differentiable ({name})",
            why="torch.autograd.grad(inputs=...) does not see the mark and drops its terms in silence",
            fix="write the backward with differentiable operations and remove the mark, or keep it out of this loss",
        )
    if str(function.__module__).partition(".")[0] in ("torch", "gradctl"):
        return None
    constant = sum(below is None for below, _ in node.next_functions)
    kept = _kept_without_graph(node)
    if len(kept) > constant:
        return NoSecondDerivative(
            f"{function.__name__} keeps a value for its backward that is neither an input nor an output",
            what=f"{len(kept)} kept {'values have' if len(kept) > 1 else 'value has'} no graph; "
            f"{constant or 'no'} inputs have none",
            why="the second derivative would leave out, in silence, how that value depends on the inputs",
            fix="keep the inputs and compute it again in backward, or return it as an output as well",
        )
    return None


def _once_differentiable(function: Any) -> bool:
    code = getattr(getattr(function, "backward", None), "__code__", None)
    made = cast("Any", torch.autograd.function.once_differentiable).__code__.co_filename
    return code is not None and code.co_filename == made and hasattr(function.backward, "__wrapped__")


def _kept_without_graph(node: Node) -> list[Tensor]:
    """Return the floating point values that a Function keeps and that carry no graph: constants, for autograd."""
    try:
        saved = list(node.saved_tensors)
    except RuntimeError:
        saved = []  # freed: the backward that comes next says so
    found: dict[int, Tensor] = {}
    for value in [*saved, *vars(node).values()]:
        # An input that requires gradients, and an output, come back with their history.
        if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
            found[id(value)] = value
    return list(found.values())


@contextlib.contextmanager
def math_attention() -> Generator[None]:
    """Compute attention with the one backend that has second derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def plain_arithmetic(device: torch.device) -> Generator[None]:
    """Differentiate outside of autocast, whatever the caller has switched on."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


_NO_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")


def differentiate(compute: Callable[[], Any], *, again: str) -> Any:
    """Run `compute`, which differentiates; say what torch's own errors mean.

    Args:
        compute: calls autograd.
        again: what to build anew when the graph is gone: "the loss", "the operator".
    Returns:
        What it returns.
    Raises:
        NoSecondDerivative: an operation on the way has no derivative of its backward.
        UsageError: the graph is gone, or a value in it was changed in place.
    """
    try:
        return compute()
    except GradctlError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        said = str(error)
        first = said.partition("\n")[0]
        if "backward through the graph a second time" in said or "have already been freed" in said:
            raise UsageError(
                "the graph of this loss is gone",
                what=first,
                why="a backward without retain_graph=True has freed it",
                fix=f"pass a function that computes the loss, or build {again} before that backward",
            ) from error
        if "modified by an inplace operation" in said:
            raise UsageError(
                "a value in this graph was changed in place since it was computed",
                what=first,
                why="an optimizer step, or an in-place operation of the program",
                fix=f"build {again} again after the change",
            ) from error
        missing = _NO_DERIVATIVE.search(said)
        raise NoSecondDerivative(
            f"{missing.group(1)} has no second derivative" if missing else "the second derivative failed",
            what=first,
            why="torch has no derivative of its backward" if missing else None,
            fix="use operations whose backward can be differentiated: torch's own, without fused or custom kernels",
        ) from error
