"""Whole Jacobians, by rows or by columns, whichever are fewer; and one for each sample of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gradctl._derivatives._forward import bound, run, with_graph
from gradctl._derivatives._graph import Reached, differentiate, plain_arithmetic, refuse_no_second_derivative, walk
from gradctl._derivatives._layers import keeps_samples_apart
from gradctl._derivatives._twice import TwiceBackward
from gradctl._derivatives._used import Unused, hold_used
from gradctl._derivatives._variables import Variables, Wanted, variables
from gradctl._errors import NotPerSample, UsageError

Method = Literal["auto", "rows", "rows-loop", "columns", "columns-loop"]
_CHUNK_BYTES = 128 << 20
_COLUMNS_COST = 3.0  # a column costs two passes where a row costs one, after a backward that records its graph


def jacobian(
    outputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Callable[..., Any],
    inputs: Wanted,
    *,
    batch: Literal["none", "samples"] = "none",
    method: Method = "auto",
    unused: Unused = "zeros",
) -> Any:
    """Return the Jacobian of outputs with respect to inputs, exactly.

    Args:
        outputs: a tensor, several, or tensors by name, with their graph; or a function that computes them (of inputs
            that it must be given, or of `inputs` themselves when it takes none). A graph that is passed is kept.
        inputs: a module (its trainable parameters), tensors by name, an iterable of tensors, or one tensor.
        batch: "samples" takes the first dim of outputs and inputs for samples that do not see each other, and gives
            the Jacobian of each: one batch of rows serves all. That they do not is checked by one more backward.
        method: "rows" differentiates outputs, many in one batched backward; "columns" moves inputs, by backward through
            the transposed product; "-loop" does it one by one; "auto" takes the fewer, batched, and one by one where an
                operation has no batching rule. `JacobianOperator.dense` says which it took.
        unused: "zeros" gives zeros for what the outputs do not depend on, "error" refuses it.
    Returns:
        For one output [*out] and one input [*in] a tensor [*out, *in], or [B, *out, *in] for samples; for several, in
        the structure of the outputs, and in it of the inputs. Detached.
    Raises:
        NotPerSample: with `batch="samples"`, an output of one sample depends on another sample.
        UsageError: the outputs have no history, or the first dims differ.
    """
    function, of = (
        bound(outputs, inputs, called="inputs") if callable(outputs) else (None, variables(inputs, called="inputs"))
    )
    columns = method.startswith("columns")
    with torch.enable_grad():
        found: Any = outputs
        if function is not None:
            # Rows need no second derivative, so that attention may keep its fast kernel.
            found = run(function) if columns else function()
    to = variables(cast("Wanted", found), called="outputs", needs_grad=False)
    with_graph(to.tensors, called="output")
    reached = walk(to.tensors, of.tensors)
    hold_used(reached, of, unused, what="output")
    return dense(to, of, reached, batch=batch, method=method)[0]


def dense(
    to: Variables, of: Variables, reached: Reached, *, batch: Literal["none", "samples"], method: Method
) -> tuple[Any, str]:
    """Return the Jacobian of a graph, in the structure of its outputs and inputs, and the methods that were taken."""
    samples = batch == "samples"
    with plain_arithmetic(of.device):
        if samples:
            _hold_samples(to, of, reached)
        methods: dict[str, None] = {}
        packed: list[Any] = []
        for output in to.tensors:
            if output.requires_grad:
                values, taken = _one(output, of, method=method, samples=samples, reached=reached)
                methods[taken] = None
            else:
                values = [_zeros(output, tensor, samples=samples) for tensor in of.tensors]
            packed.append(of.pack(values))
    return to.pack(packed), ", ".join(methods)


def _chosen(output: Tensor, of: Variables, *, samples: bool, reached: Reached) -> str:
    share = output.shape[0] if samples and output.ndim else 1
    rows, columns = output.numel() // max(share, 1), of.numel // max(share, 1)
    if columns * _COLUMNS_COST < rows and not reached.has("ScaledDotProduct"):
        return "columns"
    return "rows"


def _one(output: Tensor, of: Variables, *, method: Method, samples: bool, reached: Reached) -> tuple[list[Tensor], str]:
    chosen = _chosen(output, of, samples=samples, reached=reached) if method == "auto" else method
    if chosen.startswith("columns"):
        try:
            refuse_no_second_derivative(reached, of.tensors)
            found, looped = _by_columns(output, of, samples=samples, loop=chosen == "columns-loop")
            return found, "columns-loop" if looped else "columns"
        except RuntimeError:
            if method != "auto":
                raise
            chosen = "rows"
    found, looped = _by_rows(output, of, samples=samples, loop=chosen == "rows-loop", may_loop=method == "auto")
    return found, "rows-loop" if looped else "rows"


def _by_rows(output: Tensor, of: Variables, *, samples: bool, loop: bool, may_loop: bool) -> tuple[list[Tensor], bool]:
    of_one = output.shape[1:] if samples else output.shape
    weights = _units(of_one, like=output, samples=output.shape[0] if samples else None)
    rows = len(weights)

    def back(weight: Tensor, *, batched: bool) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(
                output, of.tensors, weight, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        )

    found, looped = _applied(back, weights, rows, of.numel + output.numel(), output.element_size(), loop, may_loop)
    jacobians: list[Tensor] = []
    for tensor, pieces in zip(of.tensors, zip(*found, strict=True), strict=True):
        shape = (rows, *tensor.shape)
        whole = _joined(pieces, shape, tensor)
        if samples:  # [out, B, *in] -> [B, *out, *in]
            whole = whole.movedim(1, 0).reshape(tensor.shape[0], *of_one, *tensor.shape[1:])
        else:
            whole = whole.reshape(*of_one, *tensor.shape)
        jacobians.append(whole)
    return jacobians, looped


def _by_columns(output: Tensor, of: Variables, *, samples: bool, loop: bool) -> tuple[list[Tensor], bool]:
    twice = differentiate(lambda: TwiceBackward([output], [output], of.tensors), again="the outputs")
    jacobians: list[Tensor] = []
    any_looped = loop
    for number, tensor in enumerate(of.tensors):
        of_one = tensor.shape[1:] if samples else tensor.shape
        units = _units(of_one, like=tensor, samples=tensor.shape[0] if samples else None)

        def forth(unit: Tensor, *, batched: bool, at: int = number) -> list[Tensor | None]:
            return [twice.along(at, unit, batched=batched)]

        size = of.numel + output.numel()
        found, looped = _applied(forth, units, len(units), size, output.element_size(), loop, True)
        any_looped = any_looped or looped
        whole = _joined([pieces[0] for pieces in found], (len(units), *output.shape), output)
        if samples:  # [in, B, *out] -> [B, *out, *in]
            whole = whole.permute(*range(1, whole.ndim), 0).reshape(*output.shape, *of_one)
        else:
            whole = whole.permute(*range(1, whole.ndim), 0).reshape(*output.shape, *tensor.shape)
        jacobians.append(whole)
    return jacobians, any_looped


def _units(shape: Sequence[int], *, like: Tensor, samples: int | None) -> Tensor:
    """Return unit vectors [n, *shape], or [n, B, *shape] with the same one in every sample."""
    count = 1
    for size in shape:
        count *= size
    eye = torch.eye(count, dtype=like.dtype, device=like.device).reshape(count, *shape)
    return eye if samples is None else eye.unsqueeze(1).expand(count, samples, *shape)


def _applied(
    apply: Callable[..., list[Tensor | None]],
    units: Tensor,
    count: int,
    numel: int,
    itemsize: int,
    loop: bool,
    may_loop: bool,
) -> tuple[list[list[Tensor | None]], bool]:
    """Apply to unit vectors, as many at once as memory allows; one by one when there is no batching rule."""
    if not loop and count > 1:
        at_once = max(1, min(count, _CHUNK_BYTES // max(1, numel * itemsize)))
        try:
            with warnings.catch_warnings():
                # torch warns where an operation has no batching rule and is looped over inside: right, only slower.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                starts = range(0, count, at_once)
                return [apply(units[start : start + at_once], batched=True) for start in starts], False
        except (RuntimeError, NotImplementedError):
            if not may_loop:
                raise
    found = [[None if each is None else each.unsqueeze(0) for each in apply(unit, batched=False)] for unit in units]
    return found, loop or count > 1


def _joined(pieces: Sequence[Tensor | None], shape: Sequence[int], like: Tensor) -> Tensor:
    if not pieces or any(piece is None for piece in pieces):
        return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
    found = [cast("Tensor", piece).detach() for piece in pieces]
    return found[0] if len(found) == 1 else torch.cat(found)


def _zeros(output: Tensor, tensor: Tensor, *, samples: bool) -> Tensor:
    shape = (*output.shape, *(tensor.shape[1:] if samples else tensor.shape))
    return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def _hold_samples(to: Variables, of: Variables, reached: Reached) -> None:
    """Hold the samples of a batch to be independent: what sample 0 gives must not move with any other.

    Raises:
        NotPerSample: it does.
        UsageError: outputs and inputs have not the same first dim.
    """
    sizes = {tuple(each.shape[:1]) for each in (*to.tensors, *of.tensors)}
    if len(sizes) != 1 or sizes == {()}:
        raise UsageError(
            "outputs and inputs have not one first dim in common",
            what=f"outputs {[list(each.shape) for each in to.tensors]}, inputs {[list(t.shape) for t in of.tensors]}",
            fix="samples lie in the first dim of each; for parameters leave batch='none'",
        )
    live = [output for output in to.tensors if output.requires_grad]
    if live[0].shape[0] < 2 or keeps_samples_apart(live, of.tensors):
        return
    generator = torch.Generator(device="cpu").manual_seed(0)
    weights = [torch.zeros_like(output) for output in live]
    for weight in weights:
        weight[0] = torch.randn(weight.shape[1:], generator=generator).to(weight) + 2.0
    found = torch.autograd.grad(live, of.tensors, weights, retain_graph=True, allow_unused=True)
    for value, name in zip(cast("Sequence[Tensor | None]", found), of.names, strict=True):
        if value is not None and bool((value[1:] != 0).any()):
            norm = reached.has("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
            raise NotPerSample(
                f"the output of sample 0 depends on other samples of {name}",
                what="its gradient is not zero there, so that no Jacobian belongs to one sample",
                why="BatchNorm in training mode computes its statistics over the batch" if norm else None,
                fix="call eval() on the model, or ask for the whole Jacobian: batch='none'",
            )
