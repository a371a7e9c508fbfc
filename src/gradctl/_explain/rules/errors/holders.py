"""Errors about live tensors that something keeps: a list that is plotted, an attribute that is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from gradctl._explain._context import Candidate, Context
from gradctl._explain._holding import Holder, holder_in, stored_at
from gradctl._explain._raised import Raised, raised
from gradctl._explain.rules import Rule
from gradctl._lineage import Node, Site


def numpy_on_grad(context: Context) -> Iterable[Candidate]:
    """A tensor with history was converted to an array: where it was kept."""
    error = raised(context, "Can't call numpy() on Tensor that requires grad")
    if error is None or error.here is None:
        return
    node = error.facts.nodes[0] if error.facts is not None and error.facts.nodes else None
    tensor = node.tensor() if node is not None else None
    stored: Site | None = None
    holder: Holder | None = None
    if tensor is not None:
        holder = holder_in(error, tensor)
        stored = stored_at(holder, node, error.stack) if holder is not None and holder.kind == "container" else None
    what = f"`{holder.name}` holds tensors" if stored is not None and holder is not None else "the tensor is one"
    yield Candidate(
        "numpy_on_grad",
        stored or error.here,
        "a tensor that still has its history is converted to an array",
        f"{what} with history, and a conversion would lose it without a word",
        "keep the number: loss.item(), or x.detach()" if stored is not None else "x.detach().cpu().numpy()",
        confidence=0.94 * error.certainty,
        evidence=((error.here, "converted"), (node.site if node is not None else None, "made"), *error.callers),
        node=node,
        explains="error",
    )


def deepcopy_nonleaf(context: Context) -> Iterable[Candidate]:
    """A tensor with history was copied or pickled with the object that holds it."""
    error = raised(context, "support the deepcopy protocol", "refusing to serialize non-leaf tensor")
    if error is None:
        return
    tensor = _copied(error)
    node = context.tracer.map.get(tensor) if tensor is not None else None
    if tensor is None or not isinstance(node, Node):
        return
    holder = holder_in(error, tensor)
    direct = _copied_itself(error, tensor)
    stored = None if direct or holder is None else stored_at(holder, node, error.stack)
    where = error.here if direct else stored or node.site or error.here
    name = f"`{holder.name}`" if holder is not None and not direct else "the object"
    yield Candidate(
        "deepcopy_nonleaf",
        where,
        "an object that holds a tensor with history is copied",
        f"{name} is a live tensor of shape {list(tensor.shape)}; its copy would need a copy of the graph",
        confidence=0.94 * error.certainty,
        evidence=((error.here, "copied"), (node.site, "made")),
        node=node,
        explains="error",
    )


def _copied(error: Raised) -> Tensor | None:
    for frame, _ in reversed(error.frames):
        for name in ("self", "tensor"):
            value = frame.f_locals.get(name)
            if frame.f_code.co_name in ("__deepcopy__", "reduce_tensor", "__reduce_ex__") and isinstance(value, Tensor):
                return value
    return None


def _copied_itself(error: Raised, tensor: Tensor) -> bool:
    """Whether the user passed the tensor itself to `deepcopy`, not something that holds it."""
    first = next((frame for frame, _ in error.frames if frame.f_code.co_name == "deepcopy"), None)
    values: Mapping[str, Any] = first.f_locals if first is not None else {}
    return values.get("x") is tensor


RULES: list[Rule] = [numpy_on_grad, deepcopy_nonleaf]
