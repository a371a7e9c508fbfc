"""Penalties on the gradient with respect to inputs, whose own gradient reaches the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from gradctl._derivatives._graph import differentiate, refuse_no_second_derivative, walk
from gradctl._errors import NotPerSample, UsageError

_BATCH_NORM = ("NativeBatchNormBackward", "CudnnBatchNormBackward", "MiopenBatchNormBackward")


def gradient_penalty(
    outputs: Tensor,
    inputs: Tensor | Sequence[Tensor],
    *,
    target: float = 1.0,
    sides: Literal["two", "one"] = "two",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Return `(norm of d output / d input - target)^2`, with a graph that always reaches the weights.

    Where a sample's gradient is exactly zero its norm has the subgradient zero: no nan, at any order of derivative.
    Gradients too large or too small to be squared have their right norm.

    Args:
        outputs: one number for each sample, [B] or [B, 1]; for several, choose or add them up first.
        inputs: what they were computed from, [B, ...], with `requires_grad` set before the forward; of several
            tensors the norm is taken jointly.
        target: the norm that costs nothing; 1 for WGAN-GP, 0 for R1 (then it is the squared norm).
        sides: "two" also pushes smaller norms up to the target, "one" leaves them.
        reduction: over the samples.
    Returns:
        The penalty, shape [], or [B] with reduction "none". Multiply it by its weight and add it to the loss.
    Raises:
        UsageError: nothing to differentiate, or more than one output for a sample.
        NoSecondDerivative: an operation between inputs and outputs cannot be differentiated twice.
        NotPerSample: a BatchNorm in training mode lies between, so that samples see each other.
    Source: Gulrajani et al. 2017, arXiv:1704.00028; one-sided: Petzka et al. 2018, arXiv:1709.08894; target 0:
        Mescheder et al. 2018, arXiv:1801.04406.
    """
    if sides not in ("two", "one"):
        raise UsageError(f"sides is 'two' or 'one', got {sides!r}")
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    if not target >= 0:
        raise UsageError(f"target is a norm, got {target}")
    several = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    _require(outputs, several)
    reached = walk([outputs], several)
    if not all(reached.used):
        place = reached.used.index(False)
        raise UsageError(
            f"outputs do not depend on inputs{f'[{place}]' if len(several) > 1 else ''}",
            what="no path leads from one to the other",
            why="it was detached, or outputs were computed from another tensor (a copy, a view made later)",
            fix="pass the very tensor that the model was called with",
        )
    refuse_no_second_derivative(reached, several)
    for name, nodes in reached.nodes.items():
        if name.startswith(_BATCH_NORM) and any(node._saved_training for node in nodes):
            raise NotPerSample(
                "BatchNorm in training mode lies between inputs and outputs",
                what="d output / d input of one sample then holds what other samples' outputs owe to it",
                why="it normalises with the statistics of the batch",
                fix="use LayerNorm, GroupNorm or InstanceNorm in a penalised model, or put it into eval mode",
            )
    # The graph of this gradient is the point: without it the penalty is a constant.
    with torch.enable_grad():
        found = differentiate(
            lambda: torch.autograd.grad(outputs.sum(), several, create_graph=True, materialize_grads=True),
            again="the outputs",
        )
        gradients = [g.flatten(1) for g in cast("Sequence[Tensor]", found)]
        if not any(g.requires_grad for g in gradients):
            raise UsageError(
                "the penalty has no gradient",
                what="d output / d input depends on nothing that requires gradients",
                why="the weights between them are frozen",
                fix="unfreeze the model that is penalised; to watch the norms only, call torch.autograd.grad",
            )
        flat = gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1)
        if target == 0:
            costs = _squares(flat)  # smooth at zero, and no root
        else:
            off = _norms(flat) - target
            costs = (off.clamp(min=0) if sides == "one" else off).square()
        if reduction == "none":
            return costs
        return costs.mean() if reduction == "mean" else costs.sum()


def _squares(flat: Tensor) -> Tensor:
    return flat.abs().square().sum(1) if flat.is_complex() else flat.square().sum(1)


def _norms(flat: Tensor) -> Tensor:
    """Euclidean norms of rows whose derivatives are zero where a row is."""
    # A norm is homogeneous: dividing by a constant first changes neither its value nor its derivatives.
    with torch.no_grad():
        scale = flat.abs().amax(1)
        zero = (scale == 0).to(scale.dtype)
        divisor = (scale + zero)[:, None]
    # A row of zeros becomes one of ones, whose norm has all derivatives, and is then multiplied by its scale: zero.
    return torch.linalg.vector_norm(flat / divisor + zero[:, None], dim=1) * scale


def _require(outputs: Tensor, inputs: list[Tensor]) -> None:
    if not inputs:
        raise UsageError("gradient_penalty got no inputs")
    for place, one in enumerate(inputs):
        label = f"inputs[{place}]" if len(inputs) > 1 else "inputs"
        if not one.requires_grad:
            raise UsageError(
                f"{label} takes no gradient",
                what="requires_grad is False",
                fix="call inputs.requires_grad_() before the model is called",
            )
        if not one.dim() or one.shape[0] != inputs[0].shape[0]:
            raise UsageError(f"{label} has shape {list(one.shape)}; dim 0 counts the samples")
    size = inputs[0].shape[0]
    if size == 0:
        raise UsageError("gradient_penalty got no samples", what="inputs have length 0 along dim 0")
    if outputs.numel() != size or (size > 1 and outputs.shape[0] != size):
        raise UsageError(
            f"outputs have shape {list(outputs.shape)} for {size} samples, not one number each",
            what="the gradient of a sum over several outputs is not the gradient of any of them",
            fix="pass outputs.flatten(1).sum(1) if that sum is meant, or the output that is meant, [B]",
        )
    if not outputs.requires_grad:
        raise UsageError(
            "outputs have no graph",
            what="they do not require gradients",
            why="they were computed under torch.no_grad, or detached",
            fix="compute them with gradients on, from inputs that require gradients",
        )
