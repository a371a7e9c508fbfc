"""How noisy a gradient is, as the batch size at which noise and signal are equal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradctl._derivatives._batch import (
    Batch,
    Check,
    LossFn,
    call,
    read_batch,
    refuse_batch_statistics,
    require_module,
    trained,
)
from gradctl._derivatives._per_sample_check import plain_gradient
from gradctl._derivatives._per_sample_norms import checked_squares
from gradctl._errors import UsageError


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """The simple noise scale tr(S) / |G|^2, in samples.

    Args:
        value: the batch size at which noise and signal are equal; inf when no signal can be told from the noise.
        stderr: its standard error, by leaving out one unit at a time; inf when no signal can be told from the noise.
        trace: unbiased estimate of tr(S), the summed variance of a sample's gradient.
        squared_norm: unbiased estimate of |G|^2; it can be negative when the noise is large.
        units: number of units that were compared.
        unit_size: samples in a unit: 1 for per-sample gradients.
    """

    value: float
    stderr: float
    trace: float
    squared_norm: float
    units: int
    unit_size: int


def gradient_noise_scale(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    microbatch: int = 1,
    check: Check = "first",
) -> NoiseScale:
    """Estimate the batch size below which larger batches save steps almost in proportion.

    Unbiased in tr(S) and |G|^2 each. With `microbatch=1` both come from per-sample norms and products, without forming
    per-sample gradients (two gradients and a pass, about); else from the gradients of equal parts of the batch, which
    also works with BatchNorm. Their ratio is biased by the order of its standard error: average `trace` and
    `squared_norm` over many batches, and divide last.

    Args:
        model: a module; its parameters that take gradients count.
        loss_fn: called as `loss_fn(model(inputs), *targets)`; returns the loss of the batch, shape [].
        batch: as in `per_sample_grads`; at least two units.
        reduction: what `loss_fn` does over its batch.
        microbatch: samples in a unit; must divide the batch.
        check: as in `per_sample_norms`; used with `microbatch=1`.
    Returns:
        The noise scale with a standard error.
    Raises:
        NotPerSample: samples depend on each other, and `microbatch` is 1.
        UsageError: fewer than two units, or `reduction` is not what `loss_fn` does.
    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1. Differs: both batch sizes come from one batch, and
        the error bar is the jackknife over its units.
    """
    model = require_module(model, "gradient_noise_scale")
    if reduction not in ("mean", "sum"):
        raise UsageError(f"reduction is 'mean' or 'sum', got {reduction!r}")
    rows = read_batch(batch)
    parameters = trained(model)
    if microbatch < 1 or rows.size % microbatch:
        raise UsageError(
            f"microbatch={microbatch} does not divide the {rows.size} samples of the batch",
            fix="choose a divisor, or leave the rest out",
        )
    if rows.size < 2 * microbatch:
        raise UsageError(
            f"{rows.size} samples in units of {microbatch} are fewer than two units",
            what="noise is what units differ by",
            fix="pass a larger batch or a smaller microbatch",
        )
    if microbatch == 1:
        norms, products = _by_sample(model, loss_fn, rows, parameters, reduction, check)
    else:
        norms, products = _by_part(model, loss_fn, rows, parameters, reduction, microbatch)
    return _estimate(norms.double().cpu(), products.double().cpu(), microbatch)


def _by_sample(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: dict[str, nn.Parameter],
    reduction: Literal["mean", "sum"],
    check: Check,
) -> tuple[Tensor, Tensor]:
    """Squared norm of each sample's gradient, and its product with the sum of all."""
    refuse_batch_statistics(model)
    values = list(parameters.values())
    with torch.enable_grad():
        _, loss = call(model, loss_fn, rows)
        total = dict(zip(parameters, plain_gradient(loss, values), strict=True))
    found = checked_squares(model, loss_fn, rows, parameters, reduction, check, direction=total)
    norms = torch.stack([one.double() for one in found.norms.values()]).sum(0)
    products = torch.stack([one.double() for one in found.products.values()]).sum(0)
    # These are shares of the batch: with a mean, a sample's own gradient is as many times larger as there are samples.
    scale = rows.size if reduction == "mean" else 1
    return norms * scale**2, products * scale**2


def _by_part(
    model: nn.Module,
    loss_fn: LossFn,
    rows: Batch,
    parameters: dict[str, nn.Parameter],
    reduction: Literal["mean", "sum"],
    size: int,
) -> tuple[Tensor, Tensor]:
    """Squared norm of each part's mean gradient, and its product with the sum of all."""
    values = list(parameters.values())
    flat: list[Tensor] = []
    for begin in range(0, rows.size, size):
        part = rows.replaced([leaf[begin : begin + size] for leaf in rows.leaves()], size)
        with torch.enable_grad():
            _, loss = call(model, loss_fn, part)
            grads = plain_gradient(loss, values)
        mean = torch.cat([g.flatten().float() if g.dtype.itemsize < 4 else g.flatten() for g in grads])
        flat.append(mean / (size if reduction == "sum" else 1))
    stacked = torch.stack(flat)
    return stacked.square().sum(1), stacked @ stacked.sum(0)


def _estimate(norms: Tensor, products: Tensor, size: int) -> NoiseScale:
    """The estimate from the squared norms of units and their products with the sum of all units."""
    count = norms.numel()
    whole = products.sum()

    def of(mean: Tensor, squared: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """tr(S) and |G|^2 from the mean squared norm of units and that of their mean."""
        signal = (number * squared - mean) / (number - 1)
        return size * (mean - squared) * number / (number - 1), signal

    trace, signal = of(norms.mean(), whole / count**2, count)
    value, stderr = math.inf, math.inf
    if float(signal) > 0:
        value = max(0.0, float(trace / signal))
        if count > 2:
            less = count - 1
            means = (norms.sum() - norms) / less
            squares = (whole - 2 * products + norms) / less**2
            traces, signals = of(means, squares, less)
            if bool((signals > 0).all()):
                left = traces / signals
                stderr = float(((left - left.mean()).square().sum() * less / count).sqrt())
    return NoiseScale(value, stderr, float(trace), float(signal), count, size)
