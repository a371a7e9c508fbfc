"""Errors about one tensor that was handed to torch: its shape, its type, its place in the graph."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradctl._explain._context import Candidate, Context, place
from gradctl._explain._cuts import describe
from gradctl._explain._raised import Raised, raised
from gradctl._explain._source import parsed
from gradctl._explain._words import word
from gradctl._explain.rules import Rule
from gradctl._lineage import Node, Site, sufficient_breaks

_SCALINGS = frozenset(
    [
        "mul",
        "__mul__",
        "__rmul__",
        "mul_",
        "__imul__",
        "multiply",
        "div",
        "__truediv__",
        "true_divide",
        "divide",
        "div_",
        "__itruediv__",
        "add",
        "__add__",
        "__radd__",
        "sub",
        "__sub__",
        "__rsub__",
        "neg",
        "__neg__",
        "to",
        "float",
        "double",
        "half",
        "clone",
        "contiguous",
    ]
)


def non_scalar_loss(context: Context) -> Iterable[Candidate]:
    """`backward()` of a tensor with more than one element."""
    error = raised(context, "grad can be implicitly created only for scalar outputs")
    if error is None or error.facts is None:
        return
    roots = error.facts.backward.roots if error.facts.backward is not None else error.facts.nodes
    root = next((node for node in roots if _numel(node) != 1), None)
    if root is None:
        return
    made = _unreduced(root)
    shape = list(root.shape)
    yield Candidate(
        "non_scalar_loss",
        made.site or error.here,
        f"backward() refused: the loss has shape {shape}, and only a single number has a gradient of its own",
        f"`{word(made)}` makes it with shape {list(made.shape)}, and nothing reduces it before backward()",
        confidence=0.95 * error.certainty,
        evidence=((error.here, "backward"), (root.site, "loss")),
        node=made,
        root=root,
        explains="error",
    )


def _unreduced(root: Node) -> Node:
    """Return the value that lacks the reduction: the loss, or what a trainer scaled afterwards in code of its own."""
    node = root
    while node.op in _SCALINGS:
        large = [parent for parent in node.inputs if _numel(parent) > 1]
        if len(large) != 1 or not large[0].stack or not node.stack or not large[0].live:
            break
        if large[0].stack[0][0] is node.stack[0][0]:
            break
        node = large[0]
    return node


def int_requires_grad(context: Context) -> Iterable[Candidate]:
    """A tensor of whole numbers or booleans is asked to require a gradient."""
    error = raised(
        context, "floating point and complex dtype can require gradients", "floating point dtype can require"
    )
    if error is None or error.here is None:
        return
    node = error.facts.nodes[0] if error.facts is not None and error.facts.nodes else None
    kind = "of whole numbers" if node is None or node.dtype is None else f"of {str(node.dtype).removeprefix('torch.')}"
    yield Candidate(
        "int_requires_grad",
        error.here,
        f"a tensor {kind} is asked to require a gradient",
        "only floating-point and complex tensors have gradients; nn.Parameter asks for one unless told otherwise",
        confidence=0.95 * error.certainty,
        evidence=error.callers,
        explains="error",
    )


def requires_grad_on_nonleaf(context: Context) -> Iterable[Candidate]:
    """`requires_grad` of the result of an operation is to be changed."""
    error = raised(context, "you can only change requires_grad flags of leaf variables")
    if error is None or error.here is None:
        return
    node = error.facts.nodes[0] if error.facts is not None and error.facts.nodes else None
    made = f"; this one is the result of `{word(node)}`" if node is not None and node.inputs else ""
    yield Candidate(
        "requires_grad_on_nonleaf",
        error.here,
        "requires_grad of a computed tensor cannot be changed",
        f"whether a result requires a gradient follows from what it was computed from{made}",
        "x = x.detach() to cut here, or freeze the parameters behind it: module.requires_grad_(False)",
        confidence=0.93 * error.certainty,
        evidence=((node.site if node is not None else None, "made"), *error.callers),
        explains="error",
    )


def retain_grad_on_constant(context: Context) -> Iterable[Candidate]:
    """`retain_grad()` of a tensor without history: what took its history."""
    error = raised(context, "can't retain_grad on Tensor that has requires_grad=False")
    if error is None or error.here is None:
        return
    node = error.facts.nodes[0] if error.facts is not None and error.facts.nodes else None
    cut = None
    if node is not None:
        found = sufficient_breaks([node])
        cut = describe(found[0]) if found else None
    where, why = (
        (cut.place, cut.why)
        if cut is not None
        else (error.here, "nothing that it was computed from requires a gradient")
    )
    yield Candidate(
        "retain_grad_on_constant",
        where,
        "retain_grad() on a tensor without history",
        f"its gradient cannot be kept, because no backward() passes it: {why}",
        "compute it with gradients on, or let the input require one: x.requires_grad_(True)",
        confidence=(0.93 if cut is not None else 0.85) * error.certainty,
        evidence=((error.here, "retain_grad"), *(cut.evidence if cut is not None else ())),
        explains="error",
    )


def non_leaf_param(context: Context) -> Iterable[Candidate]:
    """An optimizer was given the result of an operation."""
    error = raised(context, "can't optimize a non-leaf Tensor")
    if error is None:
        return
    tensor = _local(error, "add_param_group", "param")
    node = context.tracer.map.get(tensor) if tensor is not None else None
    if not isinstance(node, Node):
        if error.here is not None:
            yield _non_leaf(error, error.here, None, 0.6)
        return
    first = node
    while True:
        live = [parent for parent, alive in zip(first.inputs, first.live_inputs, strict=False) if alive]
        if len(live) != 1 or not live[0].live:
            break
        first = live[0]
    where = first.site
    if first.stack and error.stack:
        # What a network computed: the line in the function that makes the optimizer, not one inside of the network.
        parents = [parent for parent, alive in zip(first.inputs, first.live_inputs, strict=False) if alive]
        if len(parents) > 1 or any(isinstance(parent.tensor(), Parameter) for parent in parents):
            codes = [entry[0] for entry in error.stack]
            where = next((place((entry,)) for entry in first.stack if entry[0] in codes), where)
    yield _non_leaf(error, where or error.here, first, 0.95)


def _non_leaf(error: Raised, where: Site | None, node: Node | None, confidence: float) -> Candidate:
    made = f"`{word(node)}`" if node is not None else "an operation"
    return Candidate(
        "non_leaf_param",
        where,
        "the optimizer was given a computed tensor, which it cannot train",
        f"the tensor is the result of {made}; the leaf, and its gradient, is the tensor before it",
        confidence=confidence * error.certainty,
        evidence=((error.here, "optimizer made"),),
        node=node,
        explains="error",
    )


def custom_function_wrong_count(context: Context) -> Iterable[Candidate]:
    """`backward` of a custom function returned too few gradients, or one of the wrong shape."""
    error = raised(context, "returned an incorrect number of gradients", "returned an invalid gradient at index")
    if error is None or error.facts is None or error.facts.graph is None:
        return
    match = re.search(r"function (\w+) returned", error.message, re.IGNORECASE)
    if match is None:
        return
    function = next((fn for fn in error.facts.graph.nodes if fn.name() == match.group(1)), None)
    cls = getattr(type(function), "_forward_cls", None)
    if cls is None:
        return
    where, defined = _return_line(cls, error.message)
    name = cls.__name__
    yield Candidate(
        "custom_function_wrong_count",
        where,
        f"{name}.backward does not fit {name}.forward: {error.message.split(': ')[-1]}",
        "backward() returns one gradient for each argument of forward() after ctx, in its shape, and None "
        "for what is no tensor",
        "return one value for each argument of forward(), and sum over what was broadcast: grad.sum_to_size(x.shape)",
        confidence=0.95 * error.certainty,
        evidence=((defined, "defined"), (error.here, "backward")),
        explains="error",
    )


def _return_line(cls: Any, message: str) -> tuple[Site | None, Site | None]:
    import ast

    code = getattr(inspect.unwrap(cls.backward), "__code__", None)
    if code is None:
        return None, None
    defined = Site(code.co_filename, code.co_firstlineno, code.co_qualname)
    source = parsed(code.co_filename)
    got = re.search(r"got (\d+)\)", message)
    if source is None:
        return defined, defined
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef) and node.name == "backward" and node.lineno >= code.co_firstlineno:
            defined = defined._replace(line=node.lineno)
            returns = [part for part in ast.walk(node) if isinstance(part, ast.Return)]
            counts = [len(r.value.elts) if isinstance(r.value, ast.Tuple) else 1 for r in returns]
            wrong = [
                r for r, count in zip(returns, counts, strict=True) if got is not None and count == int(got.group(1))
            ]
            chosen = (wrong or returns)[-1:]
            return (defined._replace(line=chosen[0].lineno) if chosen else defined), defined
    return defined, defined


def _local(error: Raised, function: str, name: str) -> Tensor | None:
    """Return a tensor that is a local variable of a function of a library in the traceback."""
    for frame, _ in reversed(error.frames):
        if frame.f_code.co_name == function and isinstance(value := frame.f_locals.get(name), Tensor):
            return value
    return None


def _numel(node: Node) -> int:
    count = 1
    for length in node.shape:
        count *= length
    return count


RULES: list[Rule] = [
    non_scalar_loss,
    int_requires_grad,
    requires_grad_on_nonleaf,
    retain_grad_on_constant,
    non_leaf_param,
    custom_function_wrong_count,
]
