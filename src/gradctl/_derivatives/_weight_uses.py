"""Where a graph takes its weights, and what each place keeps from the forward.

A weight's gradient is a product of what an operation saved (its input) and the gradient of its output. Both are there
per sample before they are summed over the batch. A graph names them whatever module they came from: a weight that is
shared, tied, used by `F.linear(x, m.weight)` or by a module that is called twice is a leaf with several uses.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# Nodes that hand every element of a weight on, once: the gradient before them has the same norm as behind them.
_RELABELS = frozenset(
    [
        "TBackward",
        "TransposeBackward",
        "PermuteBackward",
        "ViewBackward",
        "UnsafeViewBackward",
        "ReshapeAliasBackward",
        "SqueezeBackward",
        "UnsqueezeBackward",
        "CloneBackward",
        "AliasBackward",
        "ToCopyBackward",
    ]
)
# Of these, those that keep the elements in their order.
_IN_ORDER = frozenset(
    [
        "ViewBackward",
        "UnsafeViewBackward",
        "ReshapeAliasBackward",
        "SqueezeBackward",
        "UnsqueezeBackward",
    ]
)
# Nodes that hand one part of a weight on: the gradient is zero elsewhere.
_CUTS = frozenset(["SliceBackward", "SelectBackward", "NarrowBackward"])
# Nodes that hand disjoint parts of a weight on, one by output.
_SPLITS = frozenset(
    [
        "SplitBackward",
        "SplitWithSizesBackward",
        "UnsafeSplitBackward",
        "UnbindBackward",
        "ChunkBackward",
    ]
)
# Nodes that repeat a small tensor for every sample.
_BROADCASTS = frozenset(["AddBackward", "SubBackward", "MulBackward", "ExpandBackward", "RepeatBackward"])
_SILENT = frozenset(["CloneBackward", "AliasBackward", "ToCopyBackward"])
_FUSED_RNN = ("MkldnnRnnLayerBackward", "CudnnRnnBackward", "MiopenRnnBackward")


@dataclass(frozen=True, slots=True)
class Factors:
    """Rows whose outer products add up to a weight's gradient.

    Args:
        left: [R, P, O], or integers [R, P] that stand for one-hot rows.
        right: [R, P, I].
        moving: which of them is the gradient; the other was there before.
        groups: how many blocks both are made of along their last dim; block k of one meets block k of the other.
    """

    left: Tensor
    right: Tensor
    moving: Literal["left", "right"]
    groups: int = 1

    @property
    def gradient(self) -> Tensor:
        """The rows of the gradient, [R, P * F]."""
        return (self.left if self.moving == "left" else self.right).flatten(1)


@dataclass(frozen=True, slots=True)
class Dense:
    """Rows [R, numel] that add up to a weight's gradient."""

    rows: Tensor

    @property
    def gradient(self) -> Tensor:
        """The rows, [R, numel]."""
        return self.rows


Rows = Factors | Dense
Rule = Callable[[Any, tuple[int, ...]], "Callable[[Tensor], Rows] | None"]


@dataclass(frozen=True, slots=True)
class Use:
    """One place that takes a weight.

    Args:
        node: the autograd node; the gradient of its output is what `rows` takes.
        rows: makes the rows of the weight's gradient from it.
        route: how the weight came there: relabelled, or which part of it.
        flip: whether a transposition lies between.
        looked_up: the indices of a lookup that has no samples (positions), and whose result is broadcast to them.
    """

    node: Any
    rows: Callable[[Tensor], Rows]
    route: tuple[object, ...]
    flip: bool
    looked_up: Tensor | None = None

    @property
    def in_order(self) -> bool:
        """Whether the weight comes with all of its elements, in their order but for a transposition."""
        steps: Any = self.route
        return all(step[0] in _IN_ORDER for step in steps)


@dataclass(frozen=True, slots=True)
class _Takers:
    """Which nodes take the outputs of a node, at which position, and which output; and the number of samples."""

    of: Mapping[Any, list[tuple[Any, int, int]]]
    size: int


@dataclass(frozen=True, slots=True)
class Uses:
    """All uses of the weights in a graph.

    Args:
        by_name: for each weight whose uses are all understood, these uses.
        others: for each other weight, the operation that is not.
        fused_rnn: whether a recurrent layer runs as one fused operation.
        kinds: the names of the nodes and their order: equal for graphs of equal structure.
    """

    by_name: dict[str, list[Use]]
    others: dict[str, str]
    fused_rnn: bool
    kinds: int


def find_uses(loss: Tensor, parameters: Mapping[str, Tensor], size: int) -> Uses:
    """Read the graph of `loss`; runs nothing, except what unpacking saved tensors runs.

    Args:
        loss: of the batch.
        parameters: by name.
        size: number of samples.
    """
    nodes: list[Any] = []
    takers: dict[Any, list[tuple[Any, int, int]]] = defaultdict(list)
    leaves: dict[int, Any] = {}
    names: list[str] = []
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.append(node)
        names.append(kind(node))
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node
        for position, (child, output) in enumerate(node.next_functions):
            if child is not None:
                takers[child].append((node, position, output))
                stack.append(child)
    graph = _Takers(takers, size)
    by_name: dict[str, list[Use]] = {}
    others: dict[str, str] = {}
    for name, value in parameters.items():
        leaf = leaves.get(id(value))
        uses: list[Use] = []
        fault = _follow(leaf, tuple(value.shape), (), False, graph, uses) if leaf is not None else None
        if fault is None and not _one_space(uses):
            fault = "overlapping parts of one weight"
        if fault is None:
            by_name[name] = uses
        else:
            others[name] = fault
    fused = any(name.startswith(_FUSED_RNN) for name in names)
    return Uses(by_name, others, fused, hash(tuple(names)))


def kind(node: Any) -> str:
    """The name of a node without the number of its output's version."""
    return str(node.name()).rstrip("0123456789")


def _follow(
    node: Any, shape: tuple[int, ...], route: tuple[object, ...], flip: bool, graph: _Takers, uses: list[Use]
) -> str | None:
    """Collect the uses of a weight below its relabellings; the name of an operation that is not understood, or None."""
    for taker, position, output in graph.of[node]:
        name = kind(taker)
        seen = _shape_of(node, output, shape)
        if name in _RELABELS:
            onward, turned = route, flip
            if name == "TBackward" or (name == "TransposeBackward" and len(seen) == 2):
                turned = not flip
            elif name not in _SILENT:
                onward = (*route, (name, seen, _arguments(taker), flip))
            fault = _follow(taker, shape, onward, turned, graph, uses)
        elif name in _CUTS:
            fault = _follow(taker, shape, (*route, (name, seen, _arguments(taker), flip)), flip, graph, uses)
        elif name in _SPLITS:
            # Which output of the split a taker has is known one level below.
            fault = _follow_parts(taker, route, flip, graph, uses)
        else:
            if name == "EmbeddingBackward" and position == 0:
                lifted = _lifted(taker, route, flip, graph)
                if lifted is not None:
                    uses += lifted
                    continue
            rule = _RULES.get((name, position))
            rows = rule(taker, seen) if rule is not None else None
            if flip and name == "EmbeddingBackward":
                rows = None  # a lookup in a transposed table: its rows would lie along the other dim
            fault = name if rows is None else None
            if rows is not None:
                uses.append(Use(taker, rows, route, flip))
        if fault is not None:
            return fault
    return None


def _lifted(lookup: Any, route: tuple[object, ...], flip: bool, graph: _Takers) -> list[Use] | None:
    """Uses of a looked-up table whose result is broadcast to the samples, as rows of the result; else None."""
    result = lookup._input_metadata[0].shape if hasattr(lookup, "_input_metadata") else None
    indices, padding = lookup._saved_indices, int(lookup._saved_padding_idx)
    # One row of indices for each sample is a lookup like any other.
    if indices.dim() > 1 and indices.shape[0] == graph.size:
        return None
    if result is None or flip or route or 0 <= padding < 1 << 62 or lookup._saved_scale_grad_by_freq:
        return None
    inner: list[Use] = []
    if _follow(lookup, tuple(result), (), False, graph, inner) is not None:
        return None
    for use in inner:
        spread = kind(use.node) in _BROADCASTS and math.prod(use.node._input_metadata[0].shape) > math.prod(result)
        if not (spread and use.in_order and not use.flip and use.looked_up is None):
            return None
    return [Use(use.node, use.rows, route, flip, indices) for use in inner]


def _follow_parts(split: Any, route: tuple[object, ...], flip: bool, graph: _Takers, uses: list[Use]) -> str | None:
    by_output: dict[int, list[tuple[Any, int, int]]] = defaultdict(list)
    for taker in graph.of[split]:
        by_output[taker[2]].append(taker)
    for output, some in by_output.items():
        part = (*route, ("part", kind(split), _arguments(split), output))
        fault = _follow(split, (), part, flip, _Takers({**graph.of, split: some}, graph.size), uses)
        if fault is not None:
            return fault
    return None


def _shape_of(node: Any, output: int, fallback: tuple[int, ...]) -> tuple[int, ...]:
    if hasattr(node, "variable"):
        return tuple(node.variable.shape)
    metadata = getattr(node, "_input_metadata", None)
    return tuple(metadata[output].shape) if metadata else fallback


def _arguments(node: Any) -> tuple[object, ...]:
    """The plain arguments that a node has kept: dims, sizes, indexes."""
    names = [name for name in dir(type(node)) if name.startswith("_saved_")]
    return tuple(getattr(node, name) for name in names)


def _one_space(uses: list[Use]) -> bool:
    """Whether each two uses see the same elements of the weight, or disjoint ones."""
    routes = {use.route for use in uses}
    for a in routes:
        for b in routes:
            if a != b and not _disjoint(a, b):
                return False
    return True


def _disjoint(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    for one, other in zip(a, b, strict=False):
        if one != other:
            return one[0] == other[0] == "part" and one[1:3] == other[1:3]
    return False


# ---- rules: what an operation keeps, and the rows of the gradient of the weight that it takes


def _unit(node: Any, *names: str) -> bool:
    return all(getattr(node, f"_saved_{name}", 1) == 1 for name in names)


def _mm_second(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    first = node._saved_mat1 if hasattr(node, "_saved_mat1") else node._saved_self
    if first is None or not _unit(node, "alpha"):
        return None
    return lambda g: Factors(first.unsqueeze(1), g.unsqueeze(1), "right")


def _mm_first(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    second = node._saved_mat2
    if second is None or not _unit(node, "alpha"):
        return None
    return lambda g: Factors(g.t().unsqueeze(1), second.t().unsqueeze(1), "left")


def _added(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    if not _unit(node, "alpha", "beta"):
        return None
    return lambda g: _summed(g, shape)


def _multiplied_first(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    other = node._saved_other
    return None if not isinstance(other, Tensor) else lambda g: _summed(g * other, shape)


def _multiplied_second(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    other = node._saved_self
    return None if not isinstance(other, Tensor) else lambda g: _summed(g * other, shape)


def _summed(g: Tensor, shape: tuple[int, ...]) -> Dense:
    """Rows of the gradient of what was broadcast to `g`: its broadcast dims first, as rows."""
    padded = (1,) * (g.dim() - len(shape)) + shape
    spread = [dim for dim, size in enumerate(padded) if size == 1]
    kept = [dim for dim, size in enumerate(padded) if size != 1]
    numel = 1
    for dim in kept:
        numel *= padded[dim]
    if not g.dim():
        return Dense(g.reshape(1, 1))
    return Dense(g.permute(*spread, *kept).reshape(-1, numel))


def _repeated(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    repeats = tuple(int(count) for count in node._saved_repeats)
    padded = (1,) * (len(repeats) - len(shape)) + shape

    def rows(g: Tensor) -> Rows:
        split = g.reshape([size for pair in zip(repeats, padded, strict=True) for size in pair])
        order = [2 * d for d in range(len(repeats))] + [2 * d + 1 for d in range(len(repeats))]
        return Dense(split.permute(order).flatten(len(repeats)).flatten(0, -2))

    return rows


def _layer_norm_weight(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    return lambda g: _summed(g * ((x - mean) * rstd), shape)


def _rms_norm_weight(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    x, rstd = node._saved_input, node._saved_result1
    return lambda g: _summed(g * (x * rstd), shape)


def _layer_norm_bias(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    return lambda g: _summed(g, shape)


def _channel_sums(values: Tensor, batch: int, channels: int) -> Dense:
    return Dense(values.reshape(batch, channels, -1).sum(2))


def _group_norm_weight(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    batch, channels, groups = int(node._saved_N), int(node._saved_C), int(node._saved_group)

    def rows(g: Tensor) -> Rows:
        grouped = x.reshape(batch, groups, -1)
        normal = (grouped - mean.reshape(batch, groups, 1)) * rstd.reshape(batch, groups, 1)
        return _channel_sums(g.reshape(batch, channels, -1) * normal.reshape(batch, channels, -1), batch, channels)

    return rows


def _group_norm_bias(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    batch, channels = int(node._saved_N), int(node._saved_C)
    return lambda g: _channel_sums(g, batch, channels)


def _batch_norm_weight(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    if node._saved_training or node._saved_running_mean is None:
        return None
    x, mean = node._saved_input, node._saved_running_mean
    rstd = torch.rsqrt(node._saved_running_var + node._saved_eps)

    def rows(g: Tensor) -> Rows:
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        return Dense((g.reshape(flat.shape) * ((flat - mean[:, None]) * rstd[:, None])).sum(2))

    return rows


def _batch_norm_bias(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    if node._saved_training:
        return None
    return lambda g: _channel_sums(g, g.shape[0], g.shape[1])


def _prelu_weight(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    x = node._saved_self
    return lambda g: _summed(g * x.clamp(max=0), shape)


def _embedding_weight(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    if node._saved_scale_grad_by_freq:
        return None  # divides by how often the index stands in the whole batch
    indices, padding = node._saved_indices, int(node._saved_padding_idx)

    def rows(g: Tensor) -> Rows:
        left, right = indices.reshape(-1, 1), g.reshape(-1, 1, g.shape[-1])
        if padding >= 0 and padding < 1 << 62:
            right = right * (left != padding).unsqueeze(2)
        return Factors(left, right, "right")

    return rows


def _convolution_weight(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    x, groups, transposed = node._saved_input, int(node._saved_groups), bool(node._saved_transposed)
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    kernel = shape[2:]

    def rows(g: Tensor) -> Rows:
        # A transposed convolution is the other one's backward: input and output change places.
        small, large = (x, g) if transposed else (g, x)
        windows = _unfold(large, kernel, stride, padding, dilation, tuple(small.shape[2:]))
        moving: Literal["left", "right"] = "right" if transposed else "left"
        return Factors(small.flatten(2).transpose(1, 2), windows.transpose(1, 2), moving, groups)

    return rows


def _convolution_bias(node: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Rows] | None:
    return lambda g: _channel_sums(g, g.shape[0], g.shape[1])


def _unfold(
    x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, out: tuple[int, ...]
) -> Tensor:
    """The windows of a convolution, [N, C * kernel, positions]; one position for each element of `out`."""
    if all(size == 1 for size in kernel) and all(s == 1 for s in stride) and not any(padding):
        return x.flatten(2)
    pads: list[int] = []
    for p in reversed(list(padding)):
        pads += [int(p), int(p)]
    padded = torch.nn.functional.pad(x, pads) if any(pads) else x
    n, c = padded.shape[:2]
    offsets = list(itertools.product(*(range(size) for size in kernel)))
    # One copy for each offset in the kernel is faster than torch's unfold, and works in any number of dims.
    windows = padded.new_empty(n, c, len(offsets), *out)
    for index, offset in enumerate(offsets):
        places = [
            slice(o * int(d), o * int(d) + (size - 1) * int(s) + 1, int(s))
            for o, d, s, size in zip(offset, dilation, stride, out, strict=True)
        ]
        windows[:, :, index] = padded[(slice(None), slice(None), *places)]
    return windows.flatten(3).flatten(1, 2)


_RULES: dict[tuple[str, int], Rule] = {
    ("AddmmBackward", 0): _added,
    ("AddmmBackward", 1): _mm_first,
    ("AddmmBackward", 2): _mm_second,
    ("MmBackward", 0): _mm_first,
    ("MmBackward", 1): _mm_second,
    ("AddBackward", 0): _layer_norm_bias,
    ("AddBackward", 1): _added,
    ("SubBackward", 0): _layer_norm_bias,
    ("ExpandBackward", 0): _layer_norm_bias,
    ("RepeatBackward", 0): _repeated,
    ("MulBackward", 0): _multiplied_first,
    ("MulBackward", 1): _multiplied_second,
    ("NativeLayerNormBackward", 1): _layer_norm_weight,
    ("NativeLayerNormBackward", 2): _layer_norm_bias,
    ("FusedRmsNormBackward", 1): _rms_norm_weight,
    ("NativeGroupNormBackward", 1): _group_norm_weight,
    ("NativeGroupNormBackward", 2): _group_norm_bias,
    ("NativeBatchNormBackward", 1): _batch_norm_weight,
    ("NativeBatchNormBackward", 2): _batch_norm_bias,
    ("CudnnBatchNormBackward", 1): _batch_norm_weight,
    ("CudnnBatchNormBackward", 2): _batch_norm_bias,
    ("PreluKernelBackward", 1): _prelu_weight,
    ("EmbeddingBackward", 0): _embedding_weight,
    ("ConvolutionBackward", 1): _convolution_weight,
    ("ConvolutionBackward", 2): _convolution_bias,
}
