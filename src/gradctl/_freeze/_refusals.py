"""What is refused before anything is changed."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from gradctl._errors import FreezeRefused, UsageError
from gradctl._names._modules import all_modules
from gradctl._names._patterns import other_names


def refuse_no_model(model: Any, call: str) -> None:
    """Refuse what is no module."""
    if not isinstance(model, Module):
        raise UsageError(
            f"{call} of a {type(model).__name__}",
            what="its first argument is a model, a torch.nn.Module",
            fix=f'gradctl.{call}(model, "encoder.*")',
        )


def refuse_other_than(option: str, given: Any, allowed: Sequence[str]) -> None:
    """Refuse a value that an option does not have."""
    if given not in allowed:
        raise UsageError(f"{option}={given!r}", what=f"it is {' or '.join(repr(value) for value in allowed)}")


def refuse_half_of_a_tie(
    named: Mapping[str, Tensor], chosen: Mapping[str, Tensor], verb: str, *, by_rows: Container[str] = ()
) -> None:
    """Refuse to choose a tied parameter by some of its names only: both would change."""
    for name, others in other_names(named).items():
        missing = [other for other in others if other not in chosen]
        if name in chosen and missing:
            raise FreezeRefused(
                f"{name} is tied to {', '.join(missing)}",
                what=f"{'rows' if name in by_rows else 'the patterns'} name {name} only, and they are one tensor",
                why=f"to {verb} one is to {verb} both",
                fix=f'name both: rows={{"{name}": …, "{missing[0]}": …}}'
                if name in by_rows
                else f'name both: add "{missing[0]}"; or neither: add "!{name}"',
            )


def refuse_nothing_left(model: Module, named: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> None:
    """Refuse a freeze that leaves nothing of the model to train."""
    ids = {id(parameter) for parameter in frozen.values()}
    if not any(parameter.requires_grad for parameter in named.values() if id(parameter) not in ids):
        raise FreezeRefused(
            f"this freezes all of {type(model).__name__}",
            what=f"none of its {len({id(parameter) for parameter in named.values()})} parameters would train",
            why="a loss that is computed from it alone has no gradient at all",
            fix='name a part: gradctl.freeze(model, "encoder"); or mean it: nothing_left="allow"',
        )


def refuse_what_cannot_train(chosen: Mapping[str, Parameter]) -> None:
    """Refuse to unfreeze integers."""
    for name, parameter in chosen.items():
        if not parameter.is_floating_point() and not parameter.is_complex():
            raise FreezeRefused(
                f"{name} is {parameter.dtype}",
                what="only floating point and complex tensors can require a gradient",
                fix=f'leave it out: "!{name}"',
            )


def refuse_not_in_optimizer(
    chosen: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], why: str
) -> None:
    """Refuse parameters that none of the optimizers holds."""
    held = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    missing = [name for name, parameter in chosen.items() if id(parameter) not in held]
    if missing:
        kinds = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FreezeRefused(
            f"{missing[0]}{more}: not in {kinds}",
            what=f"{len(missing)} of {len(chosen)} chosen parameters are in none of its param_groups",
            why=why,
            fix="make the optimizer from model.parameters() (those without a gradient are passed over), or "
            "optimizer.add_param_group(...)",
        )


def optimizers_of(given: Any) -> tuple[torch.optim.Optimizer, ...]:
    """Read `optimizer=`: none, one, or several; those that wrap another (accelerate's) give the inner one."""
    if given is None:
        return ()
    several: Iterable[Any] = given if isinstance(given, (list, tuple)) else (given,)
    return tuple(inner_optimizer(optimizer) for optimizer in several)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that steps, below those that wrap it."""
    while isinstance(
        vars(optimizer).get("optimizer") if hasattr(optimizer, "__dict__") else None, torch.optim.Optimizer
    ):
        optimizer = vars(optimizer)["optimizer"]
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer={type(optimizer).__name__}", what="a torch.optim.Optimizer is needed, or several")
    return optimizer


def refuse_lbfgs(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse an optimizer that moves parameters without a gradient."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise FreezeRefused(
                "LBFGS would move what is frozen",
                what="it steps all of its parameters along one direction, also those without a gradient",
                fix="give it only what trains: torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])",
            )


def is_distributed() -> bool:
    """Whether there is a process group, without which there is neither DDP nor FSDP."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def refuse_under_ddp(model: Module, changed: Mapping[str, Tensor], verb: str) -> None:
    """Refuse to change what trains below a DDP, or an FSDP1, that has been made already."""
    if not is_distributed():
        return
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel" and type(module).__module__.startswith("torch."):
            raise _wrapped(next(iter(changed), "the model"), "FullyShardedDataParallel", verb)
    ids = {id(parameter): name for name, parameter in changed.items()}
    for module in all_modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            for parameter in module.module.parameters():
                if id(parameter) in ids:
                    raise _wrapped(ids[id(parameter)], "DistributedDataParallel", verb)


def _wrapped(name: str, wrapper: str, verb: str) -> FreezeRefused:
    return FreezeRefused(
        f"{name} is in {wrapper} already",
        what=f"to {verb} it now would not reach the wrapper",
        why="the wrapper decides when it is made which gradients it reduces: one that trains later is not reduced, one "
        "that stops is waited for",
        fix=f"{verb} first, then wrap: gradctl.{'freeze' if verb == 'freeze' else 'unfreeze'}(model, ...); "
        f"model = {wrapper}(model)",
    )
