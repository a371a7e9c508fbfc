"""What a precision refuses, all before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.optim import LBFGS, Optimizer

from gradctl import _torch_private as private
from gradctl._errors import PrecisionRefused, UsageError
from gradctl._names._patterns import named_parameters
from gradctl._precision._mode import Mode

STORES_16_BITS: tuple[Mode, ...] = ("bf16-stochastic", "bf16-kahan")
SWAPS_WEIGHTS: tuple[Mode, ...] = ("bf16-master", *STORES_16_BITS)
_HALF = (torch.bfloat16, torch.float16)


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """Return what an optimizer steps, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def refuse(mode: Mode, model: Any, optimizers: Sequence[Any], *, allow_slow: bool) -> None:
    """Raise if `model` and `optimizers` cannot have `mode`.

    Raises:
        PrecisionRefused: names the parameter, the optimizer or the wrapper.
        UsageError: one of them is not a model or an optimizer.
    """
    if not isinstance(model, Module):
        raise UsageError(f"attach({type(model).__name__})", what="the first argument is a torch.nn.Module")
    named = named_parameters(model)
    _check_optimizers(mode, named, optimizers)
    if mode == "fp32":
        return
    device_type = _one_kind_of_device(named)
    for name, parameter in named.items():
        _check_parameter(mode, name, parameter)
    if mode == "fp16-scaled" and device_type == "cpu" and not allow_slow:
        raise PrecisionRefused(
            "precision 'fp16-scaled' on a CPU",
            what="float16 is 8 to 12 times slower than float32 there",
            why="CPUs have no float16 multiplication; bfloat16 needs no loss scale and is as fast as float32 or faster",
            fix='gradctl.precision("bf16-autocast"), or allow_slow=True, to try out what will run elsewhere',
        )
    if mode in SWAPS_WEIGHTS:
        _check_wrappers(mode, model, named)


def _check_optimizers(mode: Mode, named: dict[str, Parameter], optimizers: Sequence[Any]) -> None:
    names = {id(parameter): name for name, parameter in reversed(named.items())}
    owners: dict[int, int] = {}
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise PrecisionRefused("the same optimizer is given twice", fix="give it once")
    for number, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, Optimizer):
            raise UsageError(
                f"attach(..., {type(optimizer).__name__})", what="what follows the model are torch.optim.Optimizers"
            )
        kind = f"{type(optimizer).__name__} (optimizer {number})" if len(optimizers) > 1 else type(optimizer).__name__
        parameters = parameters_of(optimizer)
        if not parameters:
            raise PrecisionRefused(
                f"{kind} has no parameters",
                what="none of its groups holds one, so that it would never change anything",
                fix="give it model.parameters(), or leave it out",
            )
        for index, parameter in enumerate(parameters):
            if id(parameter) not in names:
                raise PrecisionRefused(
                    f"parameter {index} of {kind}, {list(parameter.shape)}, is not in the model",
                    what="nothing that the model computes depends on it, or it belongs to another copy of the model",
                    why="an optimizer keeps the old parameters when a deepcopy or a new head replaces them",
                    fix="make the optimizer from the parameters of the model that is trained",
                )
            if mode in STORES_16_BITS and owners.setdefault(id(parameter), number) != number:
                raise PrecisionRefused(
                    f"{names[id(parameter)]} is in two optimizers",
                    what=f"precision {mode!r} keeps what rounding took off once for each parameter",
                    fix='leave it in one of them, or use "bf16-master"',
                )
        if mode in SWAPS_WEIGHTS and isinstance(optimizer, LBFGS):
            raise PrecisionRefused(
                f"precision {mode!r} with LBFGS",
                what="its closure runs forwards inside of the step, while the weights are float32",
                fix='"bf16-autocast" works with it',
            )
    if not optimizers and mode in (*SWAPS_WEIGHTS, "fp16-scaled"):
        raise PrecisionRefused(
            f"precision {mode!r} without an optimizer",
            what="it is about what a step does",
            fix="attach(model, optimizer)",
        )


def _one_kind_of_device(named: dict[str, Parameter]) -> str:
    first: tuple[str, str] | None = None
    for name, parameter in named.items():
        kind = parameter.device.type
        if kind == "meta":
            raise PrecisionRefused(f"{name} is on the meta device", fix="materialise the model first")
        first = first or (name, kind)
        if kind != first[1]:
            raise PrecisionRefused(
                f"{name} is on {kind}, {first[0]} on {first[1]}",
                what="autocast and the loss scale are of one kind of device",
                fix="move the model to one kind of device",
            )
    if first is None:
        raise PrecisionRefused("the model has no parameters", what="there is nothing to train")
    return first[1]


def _check_parameter(mode: Mode, name: str, parameter: Parameter) -> None:
    dtype = str(parameter.dtype).removeprefix("torch.")
    if parameter.is_complex():
        raise PrecisionRefused(
            f"{name} is {dtype}",
            what="there are no 16-bit complex numbers that torch computes with",
            fix='gradctl.precision("fp32")',
        )
    if parameter.dtype is torch.float16:
        scaled = mode == "fp16-scaled"
        raise PrecisionRefused(
            f"{name} is float16",
            what="a loss scale needs float32 weights: float16 ones lose updates, and their gradients overflow"
            if scaled
            else f"precision {mode!r} starts from float32 or bfloat16 weights",
            fix="model.float() before the optimizer is made; the forward is 16-bit all the same",
        )
    if mode in ("bf16-autocast", "fp16-scaled") and parameter.dtype is torch.bfloat16 and parameter.requires_grad:
        raise PrecisionRefused(
            f"{name} is bfloat16",
            what="autocast is for float32 weights: updates below half a unit in the last place of these are lost",
            fix='model.float(), or gradctl.precision("bf16-master"), "bf16-kahan" or "bf16-stochastic"',
        )
    if mode in SWAPS_WEIGHTS and parameter.is_floating_point() and parameter.dtype not in (torch.float32, *_HALF):
        raise PrecisionRefused(
            f"{name} is {dtype}",
            what=f"precision {mode!r} would lose its digits",
            fix="model.float(), if that is meant",
        )


def refuse_inside_ddp(mode: Mode) -> None:
    """Raise if this forward runs inside of DistributedDataParallel, also one that wraps what was attached before.

    Its reducer listens to the weights as they were when it was built, and hears nothing of those that replace them:
    the ranks would drift apart without a word.

    Raises:
        PrecisionRefused: it does.
    """
    active = private.find("active_ddp")
    if active is not None and active() is not None:
        raise _wrapped("the model", "DistributedDataParallel", mode)


def _wrapped(name: str, kind: str, mode: Mode) -> PrecisionRefused:
    return PrecisionRefused(
        f"{name} is wrapped by {kind}",
        what=f"precision {mode!r} replaces the weights that it listens to: gradients would not be reduced",
        fix='"bf16-autocast" and "fp16-scaled" work with it, attached before it or after',
    )


def _check_wrappers(mode: Mode, model: Module, named: dict[str, Parameter]) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if type(module).__module__.startswith("torch.") and kind in ("DistributedDataParallel", "DataParallel"):
            raise _wrapped(name or "the model", kind, mode)
    for name, parameter in named.items():
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise PrecisionRefused(
                f"{name} is sharded (DTensor)",
                what="FSDP2 casts and gathers weights itself",
                fix="fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))",
            )
