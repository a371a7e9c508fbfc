"""What autograd's graph says of a network of layers: where parameters enter, what bends, what passes linearly."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradctl._derivatives._graph import walk
from gradctl._derivatives._split import softmax_head, split
from gradctl._derivatives._variables import Variables
from gradctl._errors import UsageError

Node = Any
# Operations that are linear in their one input that depends on the parameters, piecewise, and keep samples apart.
_PASS = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("Relu", "LeakyRelu", "Threshold", "Hardtanh", "Abs", "Clamp", "ClampMin", "Neg"),
        *("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D", "Mean", "ConstantPadNd", "UpsampleNearest2D"),
        *("View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "Alias", "Clone", "Mul", "Div", "Add", "Sub"),
        "NativeDropout",
    )
    for number in (0, 1)
)
_SMOOTH = frozenset(f"{name}Backward0" for name in ("Tanh", "Sigmoid", "Gelu", "Silu", "Softplus", "Elu"))
_LARGEST_LOSS = 256  # outputs of one sample: the root of their Hessian is dense


class NotPropagated(Exception):
    """Says what in a graph the rules do not know."""


@dataclass(frozen=True, slots=True)
class Use:
    """Where a weight, a bias, or both enter: one linear or convolution operation.

    Attributes:
        node: its node.
        weight: the weight, None when it is not asked for or not a leaf.
        bias: the bias, or None.
    """

    node: Node
    weight: Tensor | None
    bias: Tensor | None

    @property
    def numel_of_output(self) -> int:
        """Elements of the operation's output; of a convolution also its unfolded input."""
        count = math.prod(_shape(self.node))
        if self.node.name() == "ConvolutionBackward0" and self.weight is not None:
            return max(count, self.node._saved_input.shape[0] * self.weight.numel())
        return count

    def squares(self, delta: Tensor, curvature: Tensor | None) -> Generator[tuple[Tensor, Tensor]]:
        """Yield each parameter with the weighted sum over columns and samples of its squared derivatives.

        Args:
            delta: what arrives at the output, [k, B, ...].
            curvature: weights [k, B], or None for ones.
        """
        if self.node.name() == "ConvolutionBackward0":
            yield from self._of_convolution(delta, curvature)
            return
        squared = delta.square()
        if curvature is not None:
            squared = squared * curvature.unsqueeze(2)
        squared = squared.sum(0)  # [B, out]
        if self.bias is not None:
            yield self.bias, squared.sum(0)
        if self.weight is not None:
            entering = self.node._saved_mat1 if self.node.name() == "AddmmBackward0" else self.node._saved_self
            found = squared.T @ entering.detach().square()
            yield self.weight, found

    def _of_convolution(self, delta: Tensor, curvature: Tensor | None) -> Generator[tuple[Tensor, Tensor]]:
        node = self.node
        columns, samples, out = delta.shape[:3]
        flat = delta.reshape(columns, samples, out, -1)
        if self.bias is not None:
            yield self.bias, _weighted(flat.sum(3).square(), curvature)
        if self.weight is not None:
            entering = nn.functional.unfold(
                node._saved_input.detach(),
                self.weight.shape[2:],
                dilation=tuple(node._saved_dilation),
                padding=tuple(node._saved_padding),
                stride=tuple(node._saved_stride),
            )  # [B, in * kernel, L]
            yield self.weight, _weighted((flat @ entering.transpose(1, 2)).square(), curvature)


def _weighted(squares: Tensor, curvature: Tensor | None) -> Tensor:
    """Return squares [k, B, ...] weighted and summed over columns and samples."""
    if curvature is None:
        return squares.sum((0, 1))
    return torch.einsum("kb,kb...->...", curvature, squares)


@dataclass(frozen=True, slots=True)
class Bend:
    """A smooth elementwise activation: its second derivative adds curvature at its input.

    Attributes:
        node: its node.
        edge: its input.
    """

    node: Node
    edge: GradientEdge

    def curvature(self, loss: Tensor) -> Tensor:
        """Return the second derivative of the activation times the loss's gradient at its output, [B, ...]."""
        (arriving,) = torch.autograd.grad(loss, [GradientEdge(self.node, 0)], retain_graph=True)
        return _second(self.node) * arriving.detach()


def _second(node: Node) -> Tensor:
    name: str = node.name()
    if name == "TanhBackward0":
        y = node._saved_result.detach()
        return -2 * y * (1 - y * y)
    if name == "SigmoidBackward0":
        y = node._saved_result.detach()
        return y * (1 - y) * (1 - 2 * y)
    x = node._saved_self.detach().clone().requires_grad_()
    with torch.enable_grad():
        if name == "GeluBackward0":
            y = nn.functional.gelu(x, approximate=node._saved_approximate)
        elif name == "SiluBackward0":
            y = nn.functional.silu(x)
        elif name == "SoftplusBackward0":
            y = nn.functional.softplus(x, node._saved_beta, node._saved_threshold)
        else:
            y = nn.functional.elu(x, node._saved_alpha)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the diagonal of one graph is propagated.

    Attributes:
        outputs: the network's outputs, one row a sample.
        uses: where parameters enter.
        bends: the smooth activations.
    """

    outputs: GradientEdge
    uses: tuple[Use, ...]
    bends: tuple[Bend, ...]

    @property
    def num_columns(self) -> int:
        """Vectors that are sent backward for each sample: outputs, and units of smooth activations."""
        return sum(
            math.prod(_shape(edge.node, edge.output_nr)[1:]) for edge in (self.outputs, *(b.edge for b in self.bends))
        )

    def root_of_loss(self, loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return columns [k, B, outputs] and weights [k, B]: their outer products add up to the loss's Hessian."""
        head = softmax_head(loss, [self.outputs])
        if head is not None:
            # Above the softmax the loss is linear; with weights u on log p its Hessian is -sum(u) (diag p - p p'),
            # and the bracket is the sum over c of p_c (e_c - p) (e_c - p)'.
            (weights,) = torch.autograd.grad(loss, [GradientEdge(head, 0)], retain_graph=True)
            p = head._saved_result.detach().exp()
            columns = torch.eye(p.shape[1], dtype=p.dtype, device=p.device).unsqueeze(1) - p
            return columns, p.T * -weights.sum(1)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss, [self.outputs], create_graph=True)
        size = gradient.shape[1]
        if not gradient.requires_grad:
            return torch.zeros(1, *gradient.shape, dtype=gradient.dtype, device=gradient.device), None
        eye = torch.eye(size, dtype=gradient.dtype, device=gradient.device)
        units = eye.view(size, 1, *gradient.shape[1:]).expand(size, *gradient.shape)
        (hessian,) = torch.autograd.grad(
            gradient, [self.outputs], units, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        hessian = hessian.detach()
        diagonal = hessian.diagonal(dim1=0, dim2=2)  # [B, outputs]
        if int(torch.count_nonzero(hessian)) == int(torch.count_nonzero(diagonal)):
            return units, diagonal.T  # a loss of each output alone
        values, vectors = torch.linalg.eigh(hessian.transpose(0, 1))
        columns = vectors.permute(2, 0, 1).reshape(size, *gradient.shape)
        return columns.contiguous(), values.T.contiguous()


def planned(loss: Tensor, of: Variables) -> Plan | str:
    """Return how the diagonal is propagated through this graph, or what stands against it."""
    try:
        edges = split(loss, None, of.tensors)
    except UsageError as error:
        return error.headline
    if len(edges) != 1:
        return f"the loss has {len(edges)} outputs"
    for node in walk([loss], ()).nodes.get("LogSoftmaxBackward0", ()):
        if _shape(node)[2:] or int(node._saved_dim) == 0:
            return "a softmax over another dim than the last of two"
    try:
        return _plan(edges[0], of)
    except NotPropagated as reason:
        return str(reason)


def keeps_samples_apart(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether every operation from inputs to outputs is known to work on each sample of the first dim alone."""
    samples = outputs[0].shape[:1]
    wanted = {id(tensor) for tensor in inputs}
    queue: list[Node] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen: set[Node] = set(queue)
    while queue:
        node = queue.pop()
        name: str = node.name()
        below = [following for following, _ in node.next_functions]
        if name == "torch::autograd::AccumulateGrad":
            if id(node.variable) not in wanted:
                return False  # a parameter that is added or multiplied in a way that nobody has looked at
            continue
        if _shape(node)[:1] != samples:
            return False
        if name in ("AddmmBackward0", "MmBackward0", "ConvolutionBackward0"):
            weights = [below[0], below[2]] if name == "AddmmBackward0" else below[1:]
            if any(_computed(each, wanted) for each in weights):
                return False
            below = [below[1] if name == "AddmmBackward0" else below[0]]
        elif (name not in _PASS and name not in _SMOOTH) or _mixes(node, name):
            return False
        for following in below:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    return True


def _mixes(node: Node, name: str) -> bool:
    """Whether an operation whose output has the batch in its first dim may still mix samples.

    A mean over the first of two dims of one size leaves the other in its place, and values of one rank less are
    broadcast along the batch.
    """
    if name.startswith("Mean"):
        rank = len(node._saved_self_sym_sizes)
        dims = getattr(node, "_saved_dim", None)
        return not dims or any((dim - (1 << 64 if dim >= 1 << 63 else 0)) % rank == 0 for dim in dims)
    if name.startswith(("Add", "Sub", "Mul", "Div")) and not name.startswith("AddmmB"):
        rank = len(_shape(node))
        return any(_rank(below) != rank for below, _ in node.next_functions if below is not None)
    return False


def _rank(node: Node) -> int:
    return node.variable.ndim if node.name() == "torch::autograd::AccumulateGrad" else len(_shape(node))


def _computed(node: Node | None, wanted: set[int]) -> bool:
    """Whether a weight is anything but a leaf that is not differentiated, or such a leaf transposed."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return node is not None and (node.name() != "torch::autograd::AccumulateGrad" or id(node.variable) in wanted)


def _shape(node: Node, number: int = 0) -> tuple[int, ...]:
    return tuple(int(size) for size in node._input_metadata[number].shape)


def _plan(outputs: GradientEdge, of: Variables) -> Plan:
    wanted = {id(tensor): name for tensor, name in zip(of.tensors, of.names, strict=True)}
    shape = _shape(outputs.node, outputs.output_nr)
    if len(shape) != 2:
        raise NotPropagated(f"the outputs have shape {list(shape)}, not [samples, outputs]")
    samples, count = shape
    if count > _LARGEST_LOSS:
        raise NotPropagated(f"{count} outputs a sample; the rule is for {_LARGEST_LOSS}")
    uses: list[Use] = []
    bends: list[Bend] = []
    entered: set[int] = set()
    queue: list[Node] = [outputs.node]
    seen: set[Node] = {outputs.node}

    def parameter(node: Node | None) -> Tensor | None:
        """Return the leaf right behind an input, None for a constant."""
        if node is None:
            return None
        if node.name() != "torch::autograd::AccumulateGrad":
            raise NotPropagated(f"a weight that is itself computed ({node.name()})")
        leaf: Tensor = node.variable
        if id(leaf) in entered:
            raise NotPropagated(f"{wanted.get(id(leaf), 'a parameter')} is used more than once")
        entered.add(id(leaf))
        return leaf

    while queue:
        node = queue.pop()
        name: str = node.name()
        if name == "torch::autograd::AccumulateGrad":
            raise NotPropagated(f"{wanted.get(id(node.variable), 'a tensor')} enters as no weight or bias of a layer")
        if _shape(node)[:1] != (samples,):
            raise NotPropagated(f"{name} has not the batch of {samples} in its first dim")
        below = [following for following, _ in node.next_functions]
        onward: list[Node | None]
        if name in ("AddmmBackward0", "MmBackward0", "ConvolutionBackward0"):
            weight, bias, onward = _entering(node, name, parameter)
            uses.append(Use(node, weight, bias))
        elif name in _SMOOTH:
            if below[0] is not None:
                bends.append(Bend(node, GradientEdge(*node.next_functions[0])))
            onward = below
        elif name in _PASS and (sum(each is not None for each in below) < 2 or name[:3] in ("Add", "Sub")):
            if name.startswith("Div") and below[0] is None:
                raise NotPropagated("no rule for a division by a computed value")
            if _mixes(node, name):
                raise NotPropagated(f"{name} over the batch")
            onward = below
        elif name.startswith("NativeBatchNorm") and not node._saved_training and below[1] is below[2] is None:
            onward = below[:1]
        else:
            raise NotPropagated(f"no rule for {name}")
        for following in onward:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    missing = [name for key, name in wanted.items() if key not in entered]
    if missing and len(missing) == len(wanted):
        raise NotPropagated(f"{missing[0]} enters no layer")
    return Plan(outputs, tuple(uses), tuple(bends))


def _entering(node: Node, name: str, parameter: Any) -> tuple[Tensor | None, Tensor | None, list[Node | None]]:
    """Return the weight and the bias of a layer, and what the layer is applied to."""
    below = [following for following, _ in node.next_functions]
    if name == "ConvolutionBackward0":
        if node._saved_groups != 1 or node._saved_transposed or len(node._saved_stride) != 2:
            raise NotPropagated("no rule for grouped, transposed, 1d or 3d convolutions")
        return parameter(below[1]), parameter(below[2]), [below[0]]
    if name == "AddmmBackward0":
        if node._saved_alpha != 1 or node._saved_beta != 1:
            raise NotPropagated("no rule for addmm with factors")
        bias, first, second = below
        leaf = parameter(bias)
        if leaf is not None and leaf.shape != _shape(node)[1:]:
            raise NotPropagated("no rule for a bias that is not one row")
    else:
        (first, second), leaf = below, None
    if second is None:
        return None, leaf, [first]
    if second.name() != "TBackward0":
        raise NotPropagated("no rule for a product with a matrix that is not a transposed weight")
    return parameter(second.next_functions[0][0]), leaf, [first]
