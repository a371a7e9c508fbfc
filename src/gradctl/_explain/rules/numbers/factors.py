"""Products in which one factor is exactly zero: whether that is meant, and where the zero comes from."""

from __future__ import annotations

import ast
from typing import Any

from gradctl._explain._context import Context, place
from gradctl._explain._source import source_of
from gradctl._explain.rules.numbers import names
from gradctl._explain.rules.numbers.verdict import Swallowed, named
from gradctl._lineage import Hit, Mutation, Node, Site

_ZEROING = frozenset(["zero_", "zeros_", "fill_", "constant_", "mul_", "copy_", "_foreach_zero_"])
_PASSING = frozenset(
    [
        "linear",
        "matmul",
        "__matmul__",
        "mm",
        "bmm",
        "mul",
        "__mul__",
        "__rmul__",
        "dropout",
        "conv1d",
        "conv2d",
        "conv3d",
        "max_pool1d",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "mean",
        "sum",
        "cat",
        "stack",
        "div",
        "__truediv__",
        "pow",
        "square",
        "sqrt",
    ]
)


def factor(context: Context, key: int, hit: Hit, node: Node, name: str) -> Swallowed | None:
    """Return the verdict on a product that handed on exactly zero; None where no factor is zero, or it is meant."""
    saved = hit.detail["saved"]
    operands = names.PRODUCTS.get(name, {}).get(hit.detail["edge"])
    if operands is None:
        return _selection(hit, node, name)
    entry = next((saved[operand] for operand in operands if operand in saved), None)
    if entry is None or entry.get("zeros") != 1.0:
        return None
    leaf, made = entry.get("leaf"), entry.get("node")
    parameter = context.facts.parameters.get(leaf) if leaf is not None else None
    if parameter is not None and parameter.node.trainable:
        tensor = parameter.ref()
        frozen = tensor is not None and not tensor.requires_grad
        if not frozen and (parameter.norm or any(state == "ok" for _, state in parameter.states)):
            return None  # it moves, and frees this one: LoRA's B, a zero-initialised gate or convolution
        return _zero_parameter(context, leaf, parameter.node, node, own=leaf == key)
    if made is not None and made.trainable and not made.leaf:
        return _dead_value(made, node)
    if name == "Mul" and not _has_tensor_factor(node):
        # A number from the settings is meant; one that is computed anew in every step was to change.
        computed = context.finished and _is_computed(node)
        what = "what is computed here in every step is 0 each time" if computed else "the number 0"
        return Swallowed(
            "zero_grad_factor", node.site, f"the value is multiplied with {what}", node, 0.65 if computed else 0.35
        )
    return Swallowed(
        "zero_grad_factor",
        node.site,
        f"`{named(node)}` multiplies with a tensor that is exactly zero",
        node,
        0.85,
        evidence=((made.site, "where the zero factor was made"),) if made is not None and made.stack else (),
    )


def _is_computed(node: Node) -> bool:
    """Whether the number in a product is the result of a call on its line."""
    source = source_of(node.stack[0]) if node.stack else None
    expression = source.expression(node.stack[0]) if source is not None else None
    if source is None or not isinstance(expression, ast.BinOp) or not node.inputs:
        return False
    code = node.stack[0][0]
    made = {id(found) for entry in node.inputs[0].stack if entry[0] is code and (found := source.expression(entry))}
    # Of the two sides, one made the tensor; the other is the number.
    sides = [
        side
        for side in (expression.left, expression.right)
        if isinstance(side, ast.Call) and not made & {id(part) for part in ast.walk(side)}
    ]
    return bool(sides) and not any(isinstance(side, ast.Constant) for side in (expression.left, expression.right))


def _has_tensor_factor(node: Node) -> bool:
    return len(node.inputs) > 1 or not any(value == 0 for value in node.scalars)


def _zero_parameter(context: Context, key: int | None, factor_node: Node, node: Node, *, own: bool) -> Swallowed:
    """A parameter is zero and stays so, since its own gradient is zero too."""
    zeroed: Mutation | None = None
    for mutation in context.facts.mutations:
        if mutation.tensor_id == key and mutation.op in _ZEROING and not mutation.in_optimizer:
            zeroed = mutation
    where: Site | None = place(zeroed.stack) if zeroed is not None else None
    where = where or factor_node.site or node.site
    what = "multiplied with itself" if own else "its partner in the product"
    return Swallowed(
        "zero_grad_factor",
        where,
        f"a parameter of zeros is {what} at `{named(node)}`, and gets a gradient of zero itself: neither can ever move",
        node,
        0.86,
        evidence=((node.site, "the product"),),
    )


def _dead_value(made: Node, node: Node) -> Swallowed | None:
    """The other factor is computed, and all zero: name what made it so."""
    queue: list[Node] = [made]
    seen: set[int] = set()
    while queue and len(seen) < 30:
        at = queue.pop(0)
        if id(at) in seen:
            continue
        seen.add(id(at))
        op = names.operation(at)
        if op in ("relu", "leaky_relu", "relu6", "threshold"):
            return Swallowed("zero_grad_relu", at.site, f"`{op}` is 0 for all of its inputs", at, 0.8)
        if op in ("clamp", "clip", "hardtanh", "clamp_min", "clamp_max", "minimum", "maximum"):
            return Swallowed("zero_grad_clamp", at.site, f"`{op}` is 0 for all of its inputs", at, 0.75)
        if op in ("round", "floor", "trunc", "sign", "ceil"):
            return Swallowed("zero_grad_sign", at.site, f"`{op}` is 0 for all of its inputs", at, 0.75)
        if (
            op in _PASSING
            or op.endswith("__get__")
            or op in ("view", "reshape", "transpose", "permute", "flatten", "__getitem__", "t")
        ):
            queue += at.inputs
    return None


def _selection(hit: Hit, node: Node, name: str) -> Swallowed | None:
    """Where, masked_fill, dropout: nothing was selected."""
    if not name.startswith(names.SELECTIONS):
        return None
    saved: dict[str, Any] = hit.detail["saved"]
    mask = saved.get("condition") or saved.get("mask") or saved.get("result1")
    if mask is None or hit.detail["empty"]:
        return None
    share = mask.get("zeros")
    if share not in (0.0, 1.0):
        return None
    return Swallowed(
        "zero_grad_factor",
        node.site,
        f"`{named(node)}` selects nothing: its mask is {'all' if share == 0.0 else 'never'} set",
        node,
        0.8,
    )
