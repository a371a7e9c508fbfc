"""`backward_with`: backward from gradients that were computed by hand, without a loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradctl._custom_grad import _arguments as arguments
from gradctl._custom_grad._vehicle import transforms_active
from gradctl._errors import UsageError


def backward_with(
    outputs: Any,
    grads: Any,
    *,
    inputs: Tensor | Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> None:
    """Send `grads` back from `outputs`; gradients are added to `.grad` as `loss.backward()` adds them.

    The same numbers as `sum((o * g).sum()).backward()` with constant `g`, in one walk of the graph and without a loss.

    Args:
        outputs: a tensor, or a nested tuple, list or dict of tensors, each of which requires a gradient.
        grads: the gradient of each, in the same structure: of the same shape, dtype and device. They are constants.
        inputs: add to the `.grad` of these tensors only; None is every leaf that is reached.
        retain_graph: keep the graph for another walk.
        create_graph: record this walk, so that `.grad` can be differentiated; keeps the graph as well. torch
            warns of the cycle between a leaf and its `.grad`.
    Raises:
        UsageError: structures, shapes, dtypes or devices differ, an output requires no gradient, there is no output, an
            input requires no gradient, or a `torch.func` transform is active (which has no `.grad`).
    """
    if not torch.compiler.is_compiling() and transforms_active():
        raise UsageError(
            "backward_with inside a torch.func transform",
            why="it adds to .grad, and a function that is transformed returns its gradients instead",
            fix="torch.func.vjp, with the same gradients as cotangents",
        )
    paths, leaves = _leaves("outputs", outputs)
    given_paths, given = _leaves("grads", grads)
    if len(leaves) != len(given):
        raise UsageError(
            f"backward_with: {_count(leaves, 'output')} and {_count(given, 'gradient')}",
            fix="one gradient for each output, in the same order",
        )
    if [path.removeprefix("outputs") for path in paths] != [path.removeprefix("grads") for path in given_paths]:
        raise UsageError(
            "backward_with: outputs and grads have different structures",
            what=f"outputs: {', '.join(paths)}; grads: {', '.join(given_paths)}",
            fix="the same nesting and the same keys in both",
        )
    if not leaves:
        raise UsageError("backward_with: outputs holds no tensor", fix="pass at least one output")
    for path, leaf, given_path, grad in zip(paths, leaves, given_paths, given, strict=True):
        arguments.differentiable("backward_with", path, leaf)
        if not isinstance(grad, Tensor):
            raise UsageError(
                f"backward_with: {given_path} is {'None' if grad is None else 'of type ' + type(grad).__name__}",
                why="there is no loss whose gradient would be 1",
                fix=f"a tensor like {path}, for example torch.ones_like; leave the output out where it has no gradient",
            )
        if not leaf.requires_grad:
            raise UsageError(
                f"backward_with: {path} requires no gradient",
                why="it was computed without a graph: under no_grad, from constants, or detached",
                fix="compute it from parameters that require a gradient, with gradients on; or leave it out",
            )
        arguments.same("backward_with", given_path, grad, path, leaf)
    torch.autograd.backward(
        leaves, given, retain_graph=retain_graph or create_graph, create_graph=create_graph, inputs=_inputs(inputs)
    )


def _leaves(name: str, tree: Any) -> tuple[list[str], list[Any]]:
    if isinstance(tree, Tensor):
        return [name], [tree]
    found, _ = arguments.pytree.tree_flatten_with_path(tree)
    return [name + arguments.pytree.keystr(path) for path, _ in found], [leaf for _, leaf in found]


def _inputs(inputs: Tensor | Iterable[Tensor] | None) -> list[Tensor] | None:
    if inputs is None:
        return None
    listed = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not listed:
        raise UsageError("backward_with: inputs is empty", fix="leave it out for every leaf, or name some")
    for number, tensor in enumerate(listed):
        name = "inputs" if isinstance(inputs, Tensor) else f"inputs[{number}]"
        arguments.differentiable("backward_with", name, tensor)
        if not tensor.requires_grad:
            raise UsageError(
                f"backward_with: {name} requires no gradient",
                why="nothing would be added to its .grad",
                fix=f"{name}.requires_grad_(True) before the forward, or leave it out",
            )
    return listed


def _count(found: list[Any], what: str) -> str:
    return f"{len(found)} {what}{'' if len(found) == 1 else 's'}"
