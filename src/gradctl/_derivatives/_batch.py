"""A batch, its rows, and one plain call of a model on it that leaves buffers and generators as they were."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradctl._errors import NotPerSample, UsageError

LossFn = Callable[..., Tensor]
Reduction = Literal["mean", "sum", "share"]
Check = Literal["first", "always", "off"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of a model and what its loss is held against; every tensor has the samples along its first dim.

    Args:
        inputs: positional arguments of the model, as a nest of tuples, lists and dicts.
        keywords: keyword arguments of the model.
        targets: what `loss_fn` takes behind the outputs.
        size: number of samples.
    """

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    targets: tuple[Any, ...]
    size: int

    def leaves(self) -> list[Tensor]:
        """The tensors that have a row for each sample, in a fixed order."""
        found: list[Tensor] = []
        _map((self.inputs, self.keywords, self.targets), lambda leaf: found.append(leaf) or leaf)
        return found

    def replaced(self, leaves: list[Tensor], size: int) -> Batch:
        """The same batch with other tensors in the places of `leaves()`."""
        new = iter(leaves)
        inputs, keywords, targets = _map((self.inputs, self.keywords, self.targets), lambda _: next(new))
        return Batch(inputs, keywords, targets, size)

    def row(self, index: int) -> Batch:
        """Sample `index` as a batch of one."""
        return self.replaced([leaf[index : index + 1] for leaf in self.leaves()], 1)

    def signature(self) -> tuple[object, ...]:
        return tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in self.leaves())


def read_batch(batch: Any) -> Batch:
    """Read what the caller gave: a tensor, a dict of keyword arguments, or `(inputs, *targets)`.

    Raises:
        UsageError: no samples, tensors of different numbers of samples, or a container that has no rows.
    """
    inputs: Any = batch
    targets: tuple[Any, ...] = ()
    if type(batch) in (tuple, list):
        if not batch:
            raise UsageError("the batch is empty", what="it has no inputs", fix="pass (inputs, targets)")
        inputs, targets = batch[0], tuple(batch[1:])
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        keywords = dict(cast("Mapping[str, Any]", inputs))
    elif type(inputs) in (tuple, list):
        arguments = tuple(inputs)
    else:
        arguments = (inputs,)
    made = Batch(arguments, keywords, targets, 0)
    leaves = made.leaves()
    if not leaves:
        raise UsageError(
            "the batch holds no tensor with rows",
            what="a sample is a row of a tensor: dim 0 counts the samples",
            fix="pass (inputs, targets) with tensors of shape [B, ...]",
        )
    sizes = [leaf.shape[0] for leaf in leaves]
    if min(sizes) == 0:
        raise UsageError("the batch has no samples", what="a tensor of it has length 0 along dim 0")
    if len(set(sizes)) > 1:
        other = next(index for index, size in enumerate(sizes) if size != sizes[0])
        raise UsageError(
            f"tensor {other} of the batch has {sizes[other]} rows, the first has {sizes[0]}",
            what=f"its shape is {list(leaves[other].shape)}; dim 0 must count the samples in every tensor",
            fix="put the samples first (batch_first), and let the model or loss_fn hold what is common to all samples",
        )
    return Batch(arguments, keywords, targets, sizes[0])


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Rebuild a nest of tuples, lists and dicts with its tensors changed; what is common to all samples stays."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() else value
    if isinstance(value, Mapping):
        named = cast("Mapping[Any, Any]", value)
        return {name: _map(one, change) for name, one in named.items()}
    if isinstance(value, (tuple, list)):
        many = cast("tuple[Any, ...]", value)
        if type(value) not in (tuple, list):
            raise UsageError(
                f"a {type(value).__name__} has no rows",
                what="the samples of a batch must lie along dim 0 of plain tensors",
                fix="pass padded tensors, and pack them inside of the model",
            )
        return type(value)(_map(one, change) for one in many)
    return value


def require_module(model: object, call: str) -> nn.Module:
    """Return the model, or say what was given instead."""
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{call} takes a module, got {type(model).__name__}",
            fix="wrap the function in an nn.Module that holds its parameters",
        )
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, each once under its first name."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not found:
        raise UsageError(
            "no parameter of the model takes gradients", what="requires_grad is False for all", fix="unfreeze some"
        )
    return found


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse a model whose samples see each other through the statistics of their batch.

    Raises:
        NotPerSample: names the module.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and (module.training or module.running_mean is None):
            raise NotPerSample(
                f"{name or 'the model'} ({type(module).__name__}) normalises with the statistics of the batch",
                what="every output depends on every sample, so no gradient belongs to one of them",
                why="it is in training mode" if module.training else "it tracks no running statistics",
                fix=f"call .eval() on it (gradctl.freeze(model, {(name or '*')!r}, norm_stats=True)), or use GroupNorm",
            )


def call(model: nn.Module, loss_fn: LossFn, batch: Batch) -> tuple[Any, Tensor]:
    """One plain forward with the model's own parameters: the outputs and the loss, shape [].

    Buffers are copies, so that what the forward writes into them is gone afterwards.
    """
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    if buffers:
        outputs = functional_call(model, buffers, batch.inputs, batch.keywords)
    else:
        outputs = model(*batch.inputs, **batch.keywords)
    return outputs, scalar(loss_fn(outputs, *batch.targets))


def scalar(loss: Any) -> Tensor:
    """Return the loss with shape [], or say why it is none."""
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"loss_fn returned {type(loss).__name__}, not a tensor",
            what="it is called as loss_fn(model(inputs), *targets) and returns the loss, shape []",
        )
    if loss.numel() != 1:
        raise UsageError(
            f"loss_fn returned shape {list(loss.shape)}, not one number",
            what="it is called on a batch and reduces it",
            fix="return loss.mean() with reduction='mean', or loss.sum() with reduction='sum'",
        )
    return loss.reshape(())


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors in a nest of outputs, in a fixed order."""
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            for one in cast("Mapping[Any, Any]", value).values():
                visit(one)
        elif isinstance(value, (tuple, list)):
            for one in cast("tuple[Any, ...]", value):
                visit(one)

    visit(outputs)
    return found


class Generators:
    """The states of the default random generators that a model on these devices can draw from."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._devices = sorted({p.device for p in parameters.values() if p.device.type == "cuda"}, key=str)
        self._states = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def moved(self) -> bool:
        """Whether something was drawn since."""
        return any(not torch.equal(a, b) for a, b in zip(self._states, self._read(), strict=True))

    def put_back(self) -> None:
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def same(self, other: Generators) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self._states, other._states, strict=True))


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Generator[None]:
    """Put every module into eval mode, and back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@dataclass(slots=True)
class Memory:
    """What was learnt about a model at the first call with a signature."""

    facts: dict[object, Any] = field(default_factory=dict[object, Any])


_memories: weakref.WeakKeyDictionary[nn.Module, Memory] = weakref.WeakKeyDictionary()


def memory(model: nn.Module) -> dict[object, Any]:
    """The facts that were kept for this model; they go with it."""
    found = _memories.get(model)
    if found is None:
        found = _memories[model] = Memory()
    return found.facts


def signature(model: nn.Module, loss_fn: LossFn, batch: Batch, *more: object) -> tuple[object, ...]:
    """What must be equal for a check of an earlier call to hold for this one.

    A function counts by its code, so that a lambda that is written in a loop is one function.
    """
    loss: object = getattr(loss_fn, "__code__", None) or (type(loss_fn), id(loss_fn))
    modes = hash(tuple(module.training for module in model.modules()))
    taken = hash(tuple(value.requires_grad for value in model.parameters()))
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return (loss, modes, taken, autocast, batch.signature(), *more)
