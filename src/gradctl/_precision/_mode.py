"""What a precision is: a description; nothing is touched before `attach`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from torch.nn import Module
from torch.optim import Optimizer

from gradctl._errors import UsageError

if TYPE_CHECKING:
    from gradctl._precision._attached import Attached

Mode: TypeAlias = Literal["fp32", "bf16-autocast", "fp16-scaled", "bf16-master", "bf16-stochastic", "bf16-kahan"]
Pattern: TypeAlias = str | Callable[[str, Any], bool]


@dataclass(frozen=True, slots=True)
class LossScaling:
    """How the loss scale moves, as in `torch.amp.GradScaler`.

    Args:
        init_scale: the first scale.
        growth_factor: what the scale is multiplied by after `growth_interval` finite steps in a row; above 1.
        backoff_factor: what it is multiplied by after a step with an inf or NaN gradient; between 0 and 1.
        growth_interval: finite steps in a row before the scale grows.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


@dataclass(frozen=True, slots=True)
class Precision:
    """A precision, described; made by `gradctl.precision`.

    Args:
        mode: see `gradctl.precision`.
        overrides: patterns of parameter names whose modules stay in float32.
        scaling: how the loss scale moves; None in every mode but "fp16-scaled".
        seed: seed of the generator of "bf16-stochastic".
        allow_slow: take float16 on a CPU.
    """

    mode: Mode
    overrides: tuple[Pattern, ...] = ()
    scaling: LossScaling | None = None
    seed: int = 0
    allow_slow: bool = False

    def attach(self, model: Module, *optimizers: Optimizer) -> Attached:
        """Make `model` compute, and `optimizers` step, in this precision until the result's `remove()`.

        Args:
            model: its parameters are on one kind of device.
            optimizers: all that step parameters of `model`; they, their groups and their states stay the same objects.

        Returns:
            The object that a loop asks; see `Attached`. As a context manager it is removed at the end of the block.

        Raises:
            PrecisionRefused: this model, device or optimizer cannot have this precision; nothing was changed.
            PatternMatchesNothing: an override names no parameter.
        """
        from gradctl._precision._attached import Attached

        return Attached(self, model, optimizers)


def precision(
    mode: Mode,
    *,
    overrides: Mapping[Pattern, Literal["fp32"]] | None = None,
    init_scale: float | None = None,
    growth_factor: float | None = None,
    backoff_factor: float | None = None,
    growth_interval: int | None = None,
    seed: int | None = None,
    allow_slow: bool = False,
) -> Precision:
    """Describe a precision for `gradctl.Step(..., precision=...)` or for `attach` in a loop of your own.

    | mode | forward | weights kept as | bytes a weight between steps |
    |---|---|---|---|
    | `fp32` | as it is | as they are | 4 |
    | `bf16-autocast` | bfloat16 autocast | float32 | 4 |
    | `fp16-scaled` | float16 autocast, loss scale | float32 | 4 |
    | `bf16-master` | bfloat16, weights cast once a microbatch | float32 | 4, and 2 for the copies |
    | `bf16-kahan` | bfloat16 | bfloat16 and the 16 bits that rounding took off | 4 |
    | `bf16-stochastic` | bfloat16 | bfloat16, rounded up or down at random | 2 |

    In every mode gradients are accumulated and optimizers step, with their states, in float32. Parameters of batch,
    layer and group normalisation stay in float32, and so do all buffers. Inputs may stay in float32.

    Args:
        mode: one of the table.
        overrides: patterns of parameter names, each to "fp32": a module all of whose parameters match, or that owns one
            that does, keeps its weights and computes in float32: `{"head.*": "fp32"}`.
        init_scale: "fp16-scaled" only: the first loss scale, default 65536.
        growth_factor: "fp16-scaled" only: what the scale grows by, above 1, default 2.
        backoff_factor: "fp16-scaled" only: what an overflow multiplies it by, between 0 and 1, default 0.5.
        growth_interval: "fp16-scaled" only: finite steps in a row before it grows, default 2000.
        seed: "bf16-stochastic" only: seed of a generator of its own, default 0; the program's generators do not move.
        allow_slow: take "fp16-scaled" on a CPU, where it is 8 to 12 times slower than float32.

    Returns:
        The description; nothing is touched.

    Raises:
        UsageError: no such mode, or an argument that has no meaning in it.

    Source: loss scale and fp32 masters: Micikevicius et al. 2018, arXiv:1710.03740, its growth and backoff as in
        `torch.amp.GradScaler`. Stochastic rounding and compensation for bfloat16 weights: Zamirai et al. 2020,
        arXiv:2010.06192. Differs: any torch optimizer steps in float32 and only its result is rounded; the
        compensation keeps the bits that rounding took off exactly, so that no part of an update is lost.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"mode={mode!r}", what="there is no such precision", fix=", ".join(get_args(Mode)))
    given: dict[str, Any] = {
        "init_scale": init_scale,
        "growth_factor": growth_factor,
        "backoff_factor": backoff_factor,
        "growth_interval": growth_interval,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given and mode != "fp16-scaled":
        raise _means_nothing(next(iter(given)), mode, "fp16-scaled")
    if seed is not None and mode != "bf16-stochastic":
        raise _means_nothing("seed", mode, "bf16-stochastic")
    if allow_slow and mode != "fp16-scaled":
        raise _means_nothing("allow_slow", mode, "fp16-scaled")
    if overrides and mode == "fp32":
        raise UsageError("overrides with precision 'fp32'", what="everything is float32 already", fix="leave it out")
    for pattern, kind in (overrides or {}).items():
        if kind != "fp32":
            raise UsageError(f"overrides: {pattern!r} to {kind!r}", what='only "fp32" can be asked for')
    scaling = LossScaling(**given)
    for name, value, right in (
        ("init_scale", scaling.init_scale, 0 < scaling.init_scale < math.inf),
        ("growth_factor", scaling.growth_factor, 1 < scaling.growth_factor < math.inf),
        ("backoff_factor", scaling.backoff_factor, 0 < scaling.backoff_factor < 1),
        ("growth_interval", scaling.growth_interval, scaling.growth_interval >= 1),
    ):
        if not right:
            raise UsageError(f"{name}={value!r}", what="it is out of range", fix="see gradctl.precision")
    return Precision(
        mode=mode,
        overrides=tuple(overrides or ()),
        scaling=scaling if mode == "fp16-scaled" else None,
        seed=seed or 0,
        allow_slow=allow_slow,
    )


def _means_nothing(name: str, mode: str, belongs: str) -> UsageError:
    return UsageError(
        f"{name} with precision {mode!r}", what=f'it has a meaning with "{belongs}" only', fix="leave it out"
    )
