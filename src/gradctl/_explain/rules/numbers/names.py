"""Families of operations and autograd functions, as far as their numbers behave alike."""

from __future__ import annotations

import re

from gradctl._lineage import Node

MASKING = frozenset(
    ["masked_fill", "where", "__setitem__", "fill", "full_like", "masked_scatter", "index_fill", "scatter", "index_put"]
)
"""Operations that put a chosen number in place: an infinity from them is meant."""

SOFTMAX = frozenset(["softmax", "log_softmax", "scaled_dot_product_attention", "multi_head_attention_forward"])
LOG = frozenset(["log", "log2", "log10", "log1p", "logit", "xlogy", "xlog1py", "special_xlogy"])
ROOT = frozenset(["sqrt", "rsqrt", "cdist", "norm"])
POWER = frozenset(["pow", "__pow__", "__ipow__", "float_power"])
DIVISION = frozenset(
    ["div", "__truediv__", "__rtruediv__", "__rdiv__", "true_divide", "divide", "__itruediv__", "reciprocal"]
)
EXPONENTIAL = frozenset(["exp", "expm1", "exp2", "sinh", "cosh", "square", "cumprod", "prod", "softplus"])
REDUCTION = frozenset(["mean", "std", "var", "nanmean", "median", "cross_entropy", "nll_loss", "std_mean", "var_mean"])

FLAT_RELU = ("Relu", "Threshold", "LeakyRelu", "Rrelu", "PreluKernel")
FLAT_CLAMP = ("Clamp", "Hardtanh", "Hardsigmoid", "Hardswish", "Maximum", "Minimum")
FLAT_STEP = ("Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Fix", "Heaviside", "FloorDivide")
SATURATING = (
    "Sigmoid",
    "Tanh",
    "Softmax",
    "LogSoftmax",
    "LogSigmoid",
    "Softplus",
    "Gelu",
    "Silu",
    "Mish",
    "Elu",
    "Erf",
    "Exp",
    "Celu",
)
PRODUCTS: dict[str, dict[int, tuple[str, ...]]] = {
    "Mul": {0: ("other",), 1: ("self",)},
    "Mm": {0: ("mat2",), 1: ("self",)},
    "Addmm": {1: ("mat2",), 2: ("mat1",)},
    "Bmm": {0: ("mat2",), 1: ("self",)},
    "Baddbmm": {1: ("batch2",), 2: ("batch1",)},
    "Mv": {0: ("vec",), 1: ("self",)},
    "Dot": {0: ("tensor",), 1: ("self",)},
    "Addcmul": {1: ("tensor2",), 2: ("tensor1",)},
    "Convolution": {0: ("weight",), 1: ("input",)},
    "Linear": {0: ("weight",), 1: ("input",)},
    "MkldnnLinear": {0: ("weight",), 1: ("input",)},
    "NativeLayerNorm": {0: ("weight",)},
    "NativeBatchNorm": {0: ("weight",)},
    "NativeGroupNorm": {0: ("weight",)},
    "FusedRmsNorm": {0: ("weight",)},
    "Div": {1: ("self",)},
    "Pow": {0: ("self",)},
}
"""For each product, by number of the input: which saved operand its gradient is multiplied with."""
SELECTIONS = ("Where", "MaskedFill", "MaskedSelect", "MaskedScatter", "NativeDropout", "IndexFill")
"""Functions that hand a gradient on for a chosen part of the entries only."""


def operation(node: Node) -> str:
    """Return the name of the operation without the marks of its in-place form."""
    name = node.op
    return name if name.startswith("__") else name.rstrip("_")


def function(name: str) -> str:
    """Return the name of an autograd function without its ending: `Mul` for `MulBackward0`."""
    return re.sub(r"Backward\d*$", "", name)
