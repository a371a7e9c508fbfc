"""What trains and what does not: freezing by name, undone exactly.

Nothing is touched before the first call. `_flags` holds `requires_grad`, `_modes` the mode of modules, `_rows` rows of
one tensor, `_watch` what all three need at an optimizer's step; `_refusals` comes before any change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.nn import Module
from torch.optim import Optimizer

from gradctl._freeze._handle import DropoutMode, Freeze, request_for
from gradctl._freeze._layers import place_of_call
from gradctl._freeze._refusals import optimizers_of
from gradctl._freeze._schedule import UnfreezeSchedule, schedule_from
from gradctl._freeze._trainable import Trainable, trainable
from gradctl._names._patterns import Pattern

__all__ = ["Freeze", "Trainable", "UnfreezeSchedule", "freeze", "trainable", "unfreeze", "unfreeze_by_step"]


def freeze(
    model: Module,
    *patterns: Pattern,
    norm_stats: bool = True,
    dropout: DropoutMode = "keep",
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    rows: Mapping[Pattern, Any] | None = None,
    nothing_left: Literal["refuse", "allow"] = "refuse",
) -> Freeze:
    """Freeze parameters by name from now on, and put everything back exactly when asked to.

    A frozen parameter requires no gradient and has none, so that no optimizer moves it: neither its momentum nor its
    weight decay, and its optimizer state stays. A gradient of zero would not do that.

    Three forms::

        frozen = gradctl.freeze(model, "encoder.*", "!encoder.layer.11.*")
        ...
        frozen.remove()

        with gradctl.freeze(discriminator, nothing_left="allow"):
            ...

        @gradctl.freeze(model, "encoder.*")
        def warm_up(): ...

    Freezes may overlap, and be removed in any order; a flag is what it was when the last one that holds it goes.
    Whoever sets `requires_grad` in between to another value wins: every freeze of that parameter ends there. The
    gradient that a parameter had is given back with its flag, unless a step of its optimizer or a `zero_grad` has
    passed meanwhile.

    Args:
        model: where the names are from; also one that `torch.compile` or `fully_shard` has wrapped.
        patterns: globs on FQNs (`*` crosses dots), names of modules, `re:` expressions, predicates
            `(name, parameter) -> bool`, parameters or modules themselves; `!` before a string takes away again. None:
            the whole model.
        norm_stats: whether running statistics of the frozen part stand still and are used, whatever `model.train()`
            says: of BatchNorm and its like, and the power iteration of spectral norm. The frozen part is every module
            all of whose parameters require no gradient now, with all that lies in it.
        dropout: "off" puts all other modules of the frozen part into evaluation mode too, "keep" leaves them.
        optimizer: one or several that are to hold what is chosen; it is checked that they do.
        rows: rows of single tensors, by name: `{"embed.weight": range(1000)}`. A number, numbers, a range, a slice, a
            mask of rows, bool [rows], or of elements, bool of the parameter's shape. They, and the optimizer's state of
            them, stay bit for bit what they are before each step, and their gradient is zero.
        nothing_left: "allow" a freeze after which nothing of `model` trains.

    Returns:
        The handle: `remove()`, `names`; also a context manager and a decorator.

    Raises:
        PatternMatchesNothing: a pattern names nothing, or a parameter is not in the model; lists near matches.
        FreezeRefused: nothing would be left to train; a tied parameter is named by one of its names only; the model
            is in DDP already; the optimizer does not hold a parameter, or is LBFGS, which moves all that it holds (then
            also at its step). Nothing was changed.
        UsageError: what is given for rows is no rows of that parameter, none, or all.
    """
    request = request_for(
        model,
        patterns,
        place=place_of_call(),
        name="freeze",
        trains=False,
        norm_stats=norm_stats,
        dropout=dropout,
        optimizers=optimizers_of(optimizer),
        rows=rows,
        nothing_left=nothing_left,
    )
    return Freeze(request)


def unfreeze(model: Module, *patterns: Pattern, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> Freeze:
    """Let parameters train by name from now on, frozen by whomever, until the handle is removed.

    It lies over the freezes that are there: of two calls that hold one parameter, the later one counts. Running
    statistics and dropout of modules that are unfrozen whole follow `model.train()` again.

    Args:
        model: where the names are from.
        patterns: as those of `freeze`. None: the whole model.
        optimizer: one or several that are to hold what is chosen. A parameter that no optimizer holds never moves.

    Returns:
        The handle, as that of `freeze`: removing it brings back what was frozen.

    Raises:
        PatternMatchesNothing: a pattern names nothing; lists near matches.
        FreezeRefused: the optimizer does not hold a parameter; the model is in DDP already, which would not reduce its
            gradient; a parameter holds integers; a tied one is named by one of its names only. Nothing was changed.
    """
    request = request_for(
        model, patterns, place=place_of_call(), name="unfreeze", trains=True, optimizers=optimizers_of(optimizer)
    )
    return Freeze(request)


def unfreeze_by_step(
    steps: Mapping[Pattern | tuple[Pattern, ...], int],
    *,
    model: Module | None = None,
    optimizer: Optimizer | None = None,
    rest: Literal["frozen", "keep"] = "frozen",
    norm_stats: bool = True,
    dropout: DropoutMode = "keep",
) -> UnfreezeSchedule:
    """Let parts of a model begin to train at a step each; until then they are frozen, as by `freeze`.

    Steps are those that the optimizer takes, counted from 0: `500` trains from the 501st on. Microbatches do not count,
    nor steps that a gradient scaler skipped.

    Args:
        steps: when each pattern (or tuple of patterns, for `!`) begins. What two name begins with the earlier one.
        model: attach to it at once; else `schedule.attach(model, optimizer)` does.
        optimizer: whose steps count. None: the first that steps and holds a parameter of the model, so that it may be
            made later, by a Trainer for example.
        rest: what no pattern names is "frozen" throughout, or "keep"s the flags that it has.
        norm_stats: as in `freeze`.
        dropout: as in `freeze`.

    Returns:
        The schedule: `attach`, `remove`, `step`, `state_dict`, `load_state_dict`; printing it shows the table.

    Raises:
        UsageError: a step is no whole number from 0 on, or a pattern begins later than all that it names.
        PatternMatchesNothing: when it is attached: a pattern names nothing.
        FreezeRefused: when it is attached: nothing trains at step 0, or what `freeze` and `unfreeze` refuse.
    """
    schedule = schedule_from(steps, rest=rest, norm_stats=norm_stats, dropout=dropout, place=place_of_call())
    if model is not None:
        schedule.attach(model, optimizer)
    return schedule
