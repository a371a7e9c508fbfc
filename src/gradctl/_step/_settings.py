"""What a step is asked to do, checked before anything is touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from gradctl._errors import UsageError
from gradctl._step._frameworks import check_model, unwrap_optimizer
from gradctl._step._weights import Items, Reduction

Clip: TypeAlias = float | tuple[Literal["norm", "value"], float]
OnNonFinite: TypeAlias = Literal["skip", "raise", "continue"]
Update: TypeAlias = Literal["after-backward", "in-backward"]
Average: TypeAlias = Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step is asked to do.

    Args:
        accumulate: microbatches of a step.
        items: how the items of a microbatch are counted; None: as its loss says.
        loss: what a loss is of its own microbatch.
        clip_norm: the limit of the gradient norm; inf: measured and not clipped; None: neither.
        clip_value: the limit of every element, or None.
        on_nonfinite: what a NaN or inf gradient does.
        schedulers: stepped after each step that was not skipped.
        average: called with the model after each step that was not skipped.
        update: when parameters are updated.
    """

    accumulate: int
    items: Items | None
    loss: Reduction
    clip_norm: float | None
    clip_value: float | None
    on_nonfinite: OnNonFinite
    schedulers: tuple[Any, ...]
    average: Average | None
    update: Update

    @property
    def measures(self) -> bool:
        """Whether the gradient norm is wanted: to clip, or to see NaN and inf."""
        return self.clip_norm is not None or self.on_nonfinite != "continue"

    @property
    def reads(self) -> bool:
        """Whether gradients are looked at or changed, were all microbatches alike."""
        return self.measures or self.clip_value is not None


def settings(
    *,
    accumulate: Any,
    items: Any,
    loss: Any,
    clip: Any,
    on_nonfinite: Any,
    scheduler: Any,
    average: Any,
    update: Any,
    optimizers: Sequence[Any],
    scaled: bool,
) -> Settings:
    """Check and return what was asked for.

    Raises:
        UsageError: names the argument.
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise UsageError(f"accumulate={accumulate!r}", what="a step has one microbatch or more", fix="accumulate=1")
    if items is not None and items not in ("rows", "tokens") and not callable(items):
        raise UsageError(
            f"items={items!r}", what='"rows", "tokens", a function of a microbatch, or None: as the loss says'
        )
    _one_of("loss", loss, ("mean", "sum"))
    if on_nonfinite is not None:
        _one_of("on_nonfinite", on_nonfinite, ("skip", "raise", "continue"))
    _one_of("update", update, ("after-backward", "in-backward"))
    norm, value = _clip(clip)
    if on_nonfinite is None:  # looking costs a norm: it is done where one is measured anyway
        on_nonfinite = "skip" if norm is not None or scaled else "continue"
    if value is not None:
        for each in optimizers:
            if any(parameter.is_complex() for group in each.param_groups for parameter in group["params"]):
                raise UsageError(
                    f"clip={clip!r} with complex parameters", what="complex numbers have no order", fix="clip by norm"
                )
    rule: Any = items
    return Settings(
        accumulate=accumulate,
        items=rule,
        loss=loss,
        clip_norm=norm,
        clip_value=value,
        on_nonfinite=on_nonfinite,
        schedulers=_schedulers(scheduler, optimizers),
        average=_average(average),
        update=update,
    )


def one_model(model: Any) -> Module:
    """Return the model, or the models as one.

    Raises:
        UsageError: it is none.
    """
    check_model(model)
    if isinstance(model, Module):
        return model
    if isinstance(model, Iterable):
        models = list(model)
        for each in models:
            check_model(each)
        if models and all(isinstance(each, Module) for each in models):
            return ModuleList(models)
    raise UsageError(f"Step({type(model).__name__})", what="a torch.nn.Module is needed, or a list of them")


def all_optimizers(optimizer: Any, model: Module) -> tuple[Any, ...]:
    """Return the optimizers, unwrapped.

    Raises:
        UsageError: one is none, has no parameters, needs a closure, or steps a parameter that another one steps or
            that the model does not have.
    """
    given = [optimizer] if hasattr(optimizer, "param_groups") else list(_iterable(optimizer, "optimizer"))
    if not given:
        raise UsageError("Step without an optimizer", what="the list of optimizers is empty")
    found = [unwrap_optimizer(each) for each in given]
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    owners: dict[int, str] = {}
    for number, each in enumerate(found):
        label = type(each).__name__ if len(found) == 1 else f"optimizer {number} ({type(each).__name__})"
        if not hasattr(each, "param_groups") or not callable(getattr(each, "step", None)):
            raise UsageError(f"{label} is no optimizer", what="param_groups and step() are needed")
        if _needs_closure(each):
            raise UsageError(
                f"{label} needs a closure",
                what="it evaluates the loss several times in one step, each time in its own order",
                fix=f"call {type(each).__name__}.step(closure) in a loop of your own",
            )
        parameters = [parameter for group in each.param_groups for parameter in group["params"]]
        if not parameters:
            raise UsageError(f"{label} has no parameters", what="its groups are empty: a step would change nothing")
        for index, parameter in enumerate(parameters):
            if id(parameter) not in names:
                raise UsageError(
                    f"parameter {index} of {label}, shape {list(parameter.shape)}, is not in the model",
                    what="it would never get a gradient from it",
                    why="the optimizer was made before the layer was replaced, or from another copy of the model",
                    fix="make the optimizer from model.parameters(), or name all models: Step([model, head], ...)",
                )
            if id(parameter) in owners:
                raise UsageError(
                    f"{names[id(parameter)]} is in {owners[id(parameter)]} and in {label}",
                    what="it would be stepped twice",
                )
        owners.update({id(parameter): label for parameter in parameters})
    return tuple(found)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}={value!r}", what="one of " + ", ".join(f'"{each}"' for each in allowed))


def _clip(clip: Any) -> tuple[float | None, float | None]:
    if clip is None:
        return None, None
    kind, limit = clip if isinstance(clip, tuple) and len(clip) == 2 else ("norm", clip)
    if kind not in ("norm", "value") or isinstance(limit, (bool, str, Tensor)) or not isinstance(limit, (int, float)):
        raise UsageError(f"clip={clip!r}", what='a number, ("norm", number) or ("value", number)')
    limit = float(limit)
    if not limit > 0.0:
        raise UsageError(
            f"clip={clip!r}",
            what="a limit is above zero: 0 would make every gradient zero, and a negative one would turn it round",
            fix="clip=None, or freeze what shall not train: gradctl.freeze",
        )
    return (limit, None) if kind == "norm" else (None, limit)


def _schedulers(scheduler: Any, optimizers: Sequence[Any]) -> tuple[Any, ...]:
    if scheduler is None:
        return ()
    found = [scheduler] if hasattr(scheduler, "step") else list(_iterable(scheduler, "scheduler"))
    inner = {id(getattr(each, "_optimizer", each)) for each in optimizers} | {id(each) for each in optimizers}
    for each in found:
        kind = type(each).__name__
        if not callable(getattr(each, "step", None)):
            raise UsageError(f"scheduler={each!r}", what="it has no step()")
        if isinstance(each, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UsageError(
                f"scheduler={kind}",
                what="it is stepped with a metric, once an epoch, and Step has none",
                fix="scheduler.step(validation_loss) in your own loop",
            )
        own = getattr(each, "optimizer", None)
        own = getattr(own, "optimizer", own) if type(own).__name__ == "AcceleratedOptimizer" else own
        if own is not None and id(own) not in inner:
            raise UsageError(f"{kind} schedules another optimizer", what="its optimizer is none of those of this Step")
    return tuple(found)


def _average(average: Any) -> Any:
    if average is None:
        return None
    update = getattr(average, "update_parameters", None)
    if not callable(update) and not callable(average):
        raise UsageError(
            f"average={average!r}", what="a torch.optim.swa_utils.AveragedModel, or a function of the model"
        )
    if not callable(update):
        return average
    averaged: Any = average
    for name, parameter in averaged.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise UsageError(
                f"{name} of the average is {str(parameter.dtype).removeprefix('torch.')}",
                what="what a step adds to an average is below half a unit in the last place: it would stand still",
                fix="AveragedModel(model).float(), made before 16-bit weights are",
            )
    return update


def _needs_closure(optimizer: Any) -> bool:
    if isinstance(optimizer, torch.optim.LBFGS):
        return True
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def _iterable(value: Any, name: str) -> Iterable[Any]:
    if isinstance(value, Iterable) and not isinstance(value, (str, Module)):
        return value
    raise UsageError(f"{name}={value!r}", what=f"a {name} or a list of them is needed")
