"""Checks of per-sample gradients against plain autograd, and what a failed check says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradctl._derivatives._batch import Batch, Generators, LossFn, Reduction, call, evaluated, output_tensors
from gradctl._derivatives._graph import walk
from gradctl._derivatives._shares import shares_of
from gradctl._errors import GradctlError, NotPerSample, UsageError

# How far rounding alone moves a sum of rows away from the gradient of the batch, as a share of the root mean square
# row: several times what was seen over convolutions, attention and recurrent layers.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}
_HALF = 0.1
_TF32 = 1e-2
# A mismatch below this can come from a few samples: a ReLU at zero may fall to either side.
_DOUBTFUL = 0.05
# A row of an output that another row's input has moved by more than this share of the largest entry.
_MOVED = 1e-5

Compute = Callable[[nn.Module, Batch, Mapping[str, Tensor]], dict[str, Tensor]]


def check_sum(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    reduction: Reduction,
    generators: Generators,
    again: Compute,
) -> None:
    """Hold the sum of the rows against the gradient of the batch; leaves generators as one plain call does.

    Args:
        model: the model that was differentiated.
        loss_fn: its loss.
        batch: the rows.
        parameters: what was differentiated, by name.
        grads: the per-sample gradients that were found.
        reduction: what the caller says that `loss_fn` does.
        generators: the random generators before the call.
        again: computes per-sample gradients of another copy or mode of the model in the same way.
    Raises:
        NotPerSample: samples depend on each other.
        UsageError: `reduction` is not what `loss_fn` does.
    """
    generators.put_back()
    whole = _whole_gradient(model, loss_fn, batch, parameters)
    random = generators.moved()
    after = Generators(parameters)
    error = mismatch(grads, whole, batch.size, reduction)
    if not error > tolerance(parameters):
        return
    try:
        if random:
            if reduction == "share":
                raise _other_masks()
            # Other masks were drawn than in the plain forward. The rule does not depend on them: judge it without.
            with evaluated(model):
                grads = again(model, batch, parameters)
                whole = _whole_gradient(model, loss_fn, batch, parameters)
            error = mismatch(grads, whole, batch.size, reduction)
            if not error > tolerance(parameters):
                return
        if error < _DOUBTFUL and _only_kinks(model, loss_fn, batch, parameters, grads, reduction):
            return
        raise _explained(model, loss_fn, batch, parameters, grads, whole, reduction, generators)
    finally:
        after.put_back()


def mismatch(grads: Mapping[str, Tensor], whole: Mapping[str, Tensor], size: int, reduction: Reduction) -> float:
    """How far the rows are from adding up to `whole`, as a share of the root mean square row; nan when not finite."""
    off = torch.zeros(())
    scale = torch.zeros(())
    for name, rows in grads.items():
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        goal = whole[name].to(wide) / (1 if reduction == "mean" else size)
        off = off + (rows.mean(0, dtype=wide) - goal).abs().square().sum().cpu()
        scale = scale + rows.to(wide).abs().square().sum().cpu() / size
    value = float((off / scale).sqrt()) if float(scale) > 0 else (math.inf if float(off) > 0 else 0.0)
    return value


def refuse_reentrant(loss: Tensor) -> None:
    """Refuse a graph in which plain autograd would find zeros for the parameters under a reentrant checkpoint.

    Raises:
        NotPerSample: says how to make the checkpoint visible.
    """
    if walk([loss], []).has("CheckpointFunctionBackward"):
        raise NotPerSample(
            "the forward uses reentrant activation checkpointing",
            what="torch.utils.checkpoint with use_reentrant=True writes to .grad only and has no gradient to hand out",
            fix="pass use_reentrant=False to torch.utils.checkpoint.checkpoint",
        )


def coupled_module(model: nn.Module, loss_fn: LossFn, batch: Batch, generators: Generators) -> str | None:
    """The first module in which a change of sample 0 moves other samples' rows; None when none does.

    Sample 0 becomes another sample of the batch, so that integers stay valid; the same masks are drawn.
    """
    if batch.size < 2:
        return None
    leaves = batch.leaves()
    targets = len(_tensors_of(batch.targets))
    inputs = leaves[: len(leaves) - targets]
    other = next((k for k in range(1, batch.size) if any(not torch.equal(x[0], x[k]) for x in inputs)), None)
    if other is None:
        return None
    changed = [torch.cat([leaf[other : other + 1], leaf[1:]]) for leaf in inputs] + leaves[len(inputs) :]
    before = _traced(model, loss_fn, batch, generators)
    behind = _traced(model, loss_fn, batch.replaced(changed, batch.size), generators)
    for (name, old), (_, new) in zip(before, behind, strict=False):
        for a, b in zip(old, new, strict=False):
            if a.shape == b.shape and a.dim() and a.shape[0] == batch.size and a.is_floating_point():
                moved = (a[1:] - b[1:]).abs().max()
                if bool(moved > _MOVED * a.abs().max()):
                    return name
    return None


def _traced(model: nn.Module, loss_fn: LossFn, batch: Batch, generators: Generators) -> list[tuple[str, list[Tensor]]]:
    """What every module returned, innermost first."""
    seen: list[tuple[str, list[Tensor]]] = []
    handles: list[Any] = []
    for name, module in model.named_modules():

        def keep(module: nn.Module, _: object, output: Any, name: str = name) -> None:
            seen.append((_described(name, module), [one.detach().clone() for one in output_tensors(output)]))

        handles.append(module.register_forward_hook(keep))
    generators.put_back()
    try:
        # With gradients on: attention has a shortcut without them, and would not show its parts.
        with torch.enable_grad():
            call(model, loss_fn, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _described(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _tensors_of(value: Any) -> list[Tensor]:
    return [one for one in output_tensors(value) if one.dim()]


def _whole_gradient(
    model: nn.Module, loss_fn: LossFn, batch: Batch, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    with torch.enable_grad():
        _, loss = call(model, loss_fn, batch)
        refuse_reentrant(loss)
        return dict(zip(parameters, plain_gradient(loss, list(parameters.values())), strict=True))


def plain_gradient(loss: Tensor, values: Sequence[Tensor], *, retain_graph: bool = False) -> list[Tensor]:
    """The gradient of a loss, with zeros for what it does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(value) for value in values]
    found = torch.autograd.grad(loss, values, allow_unused=True, retain_graph=retain_graph)
    grads = cast("Sequence[Tensor | None]", found)
    return [
        torch.zeros_like(value) if g is None else (g.to_dense() if g.is_sparse else g)
        for g, value in zip(grads, values, strict=True)
    ]


def tolerance(parameters: Mapping[str, Tensor]) -> float:
    """How far rounding alone may move results of these parameters."""
    worst = 0.0
    for value in parameters.values():
        rounding = _ROUNDING.get(value.dtype, _HALF)
        if value.device.type == "cuda" and value.dtype == torch.float32:
            rounding = max(rounding, _TF32)
        if torch.is_autocast_enabled(value.device.type):
            rounding = _HALF
        worst = max(worst, rounding)
    return worst


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What plain autograd finds for one sample, from one forward of this sample.

    Args:
        alone: the gradient of its loss alone, flat.
        share: the gradient of its outputs weighted by the gradient of the loss of the batch, flat.
    """

    alone: Tensor
    share: Tensor


def row_facts(
    model: nn.Module, loss_fn: LossFn, batch: Batch, parameters: Mapping[str, Tensor], places: Iterable[int]
) -> dict[int, RowFacts]:
    """Facts about a few samples; a ReLU that falls to another side in the batch moves neither against the other."""
    values = list(parameters.values())
    found: dict[int, RowFacts] = {}
    with torch.enable_grad():
        outputs, loss = call(model, loss_fn, batch)
        shares = shares_of(outputs, loss, batch.size)
        for place in places:
            outputs, loss = call(model, loss_fn, batch.row(place))
            weighed = shares.weigh(outputs, [value[place : place + 1] for value in shares.values])
            share = flat(plain_gradient(weighed, values, retain_graph=True))
            found[place] = RowFacts(flat(plain_gradient(loss, values)), share)
    return found


def some_places(size: int) -> list[int]:
    """At most seven samples, evenly spread, the first and the last among them."""
    return sorted({round(k * (size - 1) / 6) for k in range(7)})


def flat(grads: Iterable[Tensor]) -> Tensor:
    """All elements in one vector, in float32 at least."""
    return torch.cat([g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in grads])


def _only_kinks(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    reduction: Reduction,
) -> bool:
    """Whether a small mismatch comes from few samples in which a ReLU at zero fell to the other side in the batch."""
    limit = 20 * tolerance(parameters)
    right = 0
    try:
        facts = row_facts(model, loss_fn, batch, parameters, some_places(batch.size))
    except UsageError:
        return False
    for place, fact in facts.items():
        goal = fact.share if reduction == "share" else fact.alone
        scale = float(goal.norm())
        right += bool((flat(grads[name][place] for name in parameters) - goal).norm() <= limit * scale)
        by = batch.size if reduction == "mean" else 1
        if reduction != "share" and bool((fact.alone / by - fact.share).norm() > limit * scale / by):
            return False
    return 2 * right > len(facts)


def _explained(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    reduction: Reduction,
    generators: Generators,
) -> GradctlError:
    """The error for rows that do not add up: its cause by elimination."""
    size = batch.size
    module = coupled_module(model, loss_fn, batch, generators)
    if module is not None:
        return coupled(module)
    limit = max(tolerance(parameters), 1e-3)
    if reduction == "mean" and mismatch(grads, {n: w / size for n, w in whole.items()}, size, "mean") < limit:
        return told_wrongly("mean", "sums", "sum")
    if reduction == "sum" and mismatch(grads, {n: w * size for n, w in whole.items()}, size, "sum") < limit:
        return told_wrongly("sum", "averages", "mean")
    share = mismatch(grads, whole, size, reduction)
    hooked = [name for name, value in parameters.items() if getattr(value, "_backward_hooks", None)]
    if hooked:
        return NotPerSample(
            f"{hooked[0]} has a gradient hook",
            what=f"the gradients of the samples miss the gradient of the batch by {share:.0%} of a row",
            why="the hook sees one gradient per batch in training; vmap does not run it, the loop runs it per sample",
            fix="remove the hook for this call",
        )
    return unequal(share)


def coupled(module: str) -> NotPerSample:
    """The error for samples that depend on each other."""
    return NotPerSample(
        f"{module} mixes the samples of the batch",
        what="other samples' rows of its output move when only sample 0 changes",
        why="then every sample's loss depends on every sample, and no gradient belongs to one of them",
        fix="let it work on each sample alone, or put it into eval mode",
    )


def told_wrongly(said: str, does: str, right: str) -> UsageError:
    """The error for a reduction that is another than the one which was said."""
    return UsageError(
        f"reduction={said!r} was said, but loss_fn {does} over its batch",
        what=f"the gradients of the samples match the gradient of the batch only with reduction={right!r}",
        fix=f"pass reduction={right!r}",
    )


def unequal(share: float) -> UsageError:
    """The error for a loss that is no plain mean or sum of its samples' losses."""
    return UsageError(
        "loss_fn is no plain mean or sum over the samples",
        what=f"the gradients of the samples alone miss the gradient of the batch by {share:.0%} of a row",
        why="class weights, ignore_index, unequal numbers of tokens, or a loss between samples",
        fix="reduction='share' gives what each sample adds to the gradient of the batch; "
        "check='off' gives the gradient of each sample's loss alone",
    )


def _other_masks() -> NotPerSample:
    return NotPerSample(
        "the shares of the batch need the dropout masks of the batch",
        what="reduction='share' weights the outputs of one forward, and each sample's own forward drew other masks",
        fix="call model.eval() for it, or use a loss_fn that sums and reduction='sum'",
    )
