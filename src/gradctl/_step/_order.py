"""The order of a step, in one place.

zero → (microbatch: forward, weigh, scale, backward) × k → sync after the last → unscale → measure → clip → step or skip
→ average, scheduler → loss scale. `Order.zero`, `backward` and `update` are read top to bottom.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradctl import _taps
from gradctl._buckets import Buckets, Gradients
from gradctl._errors import NonFiniteGradient, UsageError
from gradctl._precision import Attached, StallWatch
from gradctl._step._in_backward import InBackward
from gradctl._step._listeners import clip_aloud, tell_skip
from gradctl._step._plain import AsItIs
from gradctl._step._result import StepResult
from gradctl._step._settings import Settings
from gradctl._step._weights import as_count, check_loss, check_reduction, divisor_of

_EPSILON = 1e-6  # as in torch's clip_grad_norm_
_SKIPS = 50  # in a row: a loss scale of 2 ** 16 has come down to 2 ** -34 by then
_NONE = Buckets().of(())
_LOOK_EVERY = 50  # steps between two looks for 16-bit weights that do not move


@dataclass(slots=True)
class SoFar:
    """What a step has accumulated.

    Args:
        microbatches: how many, empty ones too.
        items: of all of them.
        divisor: what the gradients so far are divided by; 0 before the first item.
        losses: of each microbatch that has items, detached, with its number of items.
        items_by_divisor: items for each unit that a loss says it was divided by; None if it does not say.
    """

    microbatches: int = 0
    items: float = 0.0
    divisor: float = 0.0
    losses: list[tuple[Tensor, float]] = field(default_factory=list[tuple[Tensor, float]])
    items_by_divisor: float | None = None


class Order:
    """Keeps the order of a step, and everything that is counted and divided in it.

    Args:
        settings: what to do.
        attached: the precision.
        optimizers: stepped all, or none of them.
        model: what the schedules and the average are about.
        names: FQN of each parameter, by `id`.
    """

    def __init__(
        self,
        settings: Settings,
        attached: Attached | AsItIs,
        optimizers: tuple[Any, ...],
        model: Any,
        names: Mapping[int, str],
    ) -> None:
        self.settings = settings
        self.attached = attached
        self.so_far = SoFar()
        self.skips_in_a_row = 0
        self.steps = 0
        self._optimizers = optimizers
        self._model = model
        self._names = names
        self._buckets = Buckets()
        self._in_backward = InBackward(optimizers) if settings.update == "in-backward" else None
        self._stall: StallWatch | None = None
        self._may_stall = isinstance(attached, AsItIs) or attached.precision.mode == "fp32"
        # A distributed layer sets these two, and nothing else does: `count_all` makes the items of this process those
        # of all, `sync` sums the gradients of all processes.
        self.count_all: Callable[[float], float] | None = None
        self.sync: Callable[[], None] | None = None

    # -- a microbatch --------------------------------------------------------------------------------------------------

    def zero(self) -> None:
        """Before the first microbatch of a step: drop every gradient that is there."""
        # To None: what gets no gradient in this step is not updated in it. Before the forward, which uses the memory,
        # and not after the update: until then the gradients can be read, and memory that is freed where nothing
        # follows goes back to the system and is fetched again page by page (7 % of a step of an MLP). Whatever else
        # has left a gradient, validation, a look at one, an aborted step, has no part in this step either.
        if self.so_far.microbatches == 0 and any(p.grad is not None for p in self.attached.stepped()):
            self.attached.zero_grad()

    def backward(self, loss: Any, items: float | None) -> None:
        """Run the backward of one microbatch, weighed so that the sum is the gradient of one big batch.

        Raises:
            UsageError: the loss is no single number, is not what it was told to be, or cannot be weighed.
        """
        settings, attached, so_far = self.settings, self.attached, self.so_far
        if attached.is_inside_forward():
            raise UsageError(
                "step.backward() inside of step.forward()",
                what="the backward would run under autocast",
                why="custom functions, recomputation and hooks that run in backward would be cast as well",
                fix="end the `with step.forward():` block before step.backward(loss)",
            )
        if items != 0:
            check_loss(loss)
            items = self._items(loss, items)

        self.zero()  # of a loop without `forward`

        if items == 0:
            # A mean over nothing is NaN, and its backward may be as well: what has no item has no gradient.
            so_far.microbatches += 1
            attached.collect()
            return

        # weigh: divided by what the whole step is expected to hold, `k` times the first microbatch. Where that is so,
        # the factors are the 1/k that one writes by hand; where it is not, `update` multiplies the sum by
        # expected / counted, once and in float32. Accumulating bare sums instead would make the scaled gradients of a
        # 16-bit forward as many times larger as there are items, which overflows.
        if so_far.divisor == 0.0:
            so_far.divisor = items * settings.accumulate
        share = (items if settings.loss == "mean" else 1.0) / so_far.divisor
        weighed = loss if share == 1.0 else loss * share

        # scale, then backward, outside of autocast: backward runs each operation in the dtype of its forward anyway.
        attached.scale(weighed).backward()
        # collect: the weights are float32 again, and so are the gradients, summed up.
        attached.collect()

        so_far.microbatches += 1
        so_far.items += items
        so_far.losses.append((loss.detach(), items if settings.loss == "mean" else 1.0))

    # -- the update ----------------------------------------------------------------------------------------------------

    def update(self) -> StepResult:
        """Apply what was accumulated, or skip it, and begin anew.

        Raises:
            NonFiniteGradient: `on_nonfinite="raise"`, or too many steps in a row were skipped.
        """
        settings, attached, so_far = self.settings, self.attached, self.so_far
        scale = attached.loss_scale

        # count: the divisor is the number of items of the whole step, over all microbatches and processes.
        items = so_far.items if self.count_all is None else float(self.count_all(so_far.items))
        correction = so_far.divisor / items if items and so_far.divisor else 1.0
        gradients = self._buckets.of(attached.stepped()) if settings.reads or correction != 1.0 else _NONE

        # sync: after the last backward, so that one reduction serves all microbatches; the sum over processes needs
        # every process's gradients divided by the same number first.
        if self.sync is not None:
            if correction != 1.0:
                gradients.multiply(correction)
                correction = 1.0
            self.sync()
            gradients = self._buckets.of(attached.stepped()) if settings.reads else _NONE

        # unscale: before measuring, as limit and norm are in the units of the loss. Once, for all optimizers.
        if isinstance(attached, Attached) and attached.scales:
            attached.unscale()

        # measure: one norm over all parameters of all optimizers. It is NaN or inf if any element is, so that it
        # stands for found_inf: one number is read from the device in a step.
        norm = gradients.norm() if settings.measures else None
        if norm is not None and settings.on_nonfinite != "continue":
            norm = float(norm)
            if math.isinf(norm) or norm == 0.0:  # squares that float32 does not hold are no fault of the gradients
                norm = gradients.exact_norm()
        found_inf = isinstance(norm, float) and not math.isfinite(norm)
        norm = None if norm is None else norm * correction
        if found_inf and settings.on_nonfinite == "raise":
            self.forget()
            raise self._nonfinite()

        skipped = items == 0 or (found_inf and settings.on_nonfinite == "skip")
        if not skipped:
            # clip: once, in unscaled float32, and by one factor for all, which takes the correction along.
            self._clip(gradients, norm, correction)
            # step: all optimizers or none of them. One that goes on while another skips trains against a model that
            # stands still.
            self._step()
            # average and schedule what has happened: a skipped step is none.
            if settings.average is not None:
                settings.average(self._model)
            for scheduler in settings.schedulers:
                scheduler.step()
        elif items != 0:
            for optimizer in self._optimizers:
                attached.skip(optimizer) if isinstance(attached, Attached) and attached.scales else tell_skip(optimizer)

        # loss scale: after the step, whose gradients were divided by the old one.
        if items != 0:
            attached.update(found_inf)

        result = StepResult(
            skipped=skipped,
            scale=scale,
            items=int(items) if items.is_integer() else items,
            microbatches=so_far.microbatches,
            losses=tuple((value, weight / items) for value, weight in so_far.losses),
            norm=norm,
            limit=math.inf if settings.clip_norm is None else settings.clip_norm,
        )
        self.forget()
        self._count(found_inf, skipped)
        return result

    def forget(self) -> None:
        """Begin to count anew; gradients stay where they are."""
        self.so_far = SoFar()

    def named(self) -> dict[str, Tensor]:
        """Return the parameters that are stepped, by FQN."""
        return {self._names.get(id(p), f"parameter {index}"): p for index, p in enumerate(self.attached.stepped())}

    def remove(self) -> None:
        """Take the hooks and the precision back."""
        if self._in_backward is not None:
            self._in_backward.remove()
        self.attached.remove()

    # -- details -------------------------------------------------------------------------------------------------------

    def _items(self, loss: Tensor, items: float | None) -> float:
        """Return the number of items of a loss, and hold it against what the loss itself says."""
        settings, so_far = self.settings, self.so_far
        if settings.accumulate == 1:
            if items is not None:
                return items
            if settings.loss == "mean":
                divisor = divisor_of(loss)
                return 1.0 if divisor is None else divisor
        else:
            check_reduction(loss, settings.loss, settings.accumulate)
        divisor = divisor_of(loss) if settings.loss == "mean" else None
        if items is None:
            if divisor is None:
                raise UsageError(
                    f"microbatch {so_far.microbatches + 1} came without its number of items",
                    what=f"the loss ends in {_last_operation(loss)}, which does not tell what it was divided by",
                    why="microbatches of different sizes do not count the same",
                    fix='step.backward(loss, items=len(x)), or Step(..., items="rows"); items=1 if all are alike',
                )
            return divisor
        if divisor is not None:
            ratio = items / divisor if divisor else math.inf
            before = so_far.items_by_divisor
            if not divisor or (before is not None and not math.isclose(ratio, before, rel_tol=1e-4)):
                raise UsageError(
                    f"microbatch {so_far.microbatches + 1} counts as {items:g} items, "
                    f"and its loss is a mean over {divisor:g}",
                    what="the sum would not be the gradient of one big batch"
                    + (f": before it one item was {1 / before:g} elements of the mean" if before else ""),
                    fix='leave items out: the loss tells its own; or reduction="sum" in the loss and loss="sum"',
                )
            so_far.items_by_divisor = ratio
        return items

    def _clip(self, gradients: Gradients, norm: float | Tensor | None, correction: float) -> None:
        limit = self.settings.clip_norm
        factor: float | Tensor = correction
        if limit is not None and norm is not None:
            if isinstance(norm, Tensor):  # nobody waits for the device: the factor stays there
                clipped = correction * torch.clamp(limit / (norm + _EPSILON), max=1.0)
                factor = torch.where(torch.isfinite(norm), clipped, torch.full_like(norm, correction))
            elif math.isfinite(norm):
                if _taps.clip.is_installed() and correction != 1.0:
                    gradients.multiply(correction)
                    factor = correction = 1.0
                if not clip_aloud(gradients.owners, norm, limit) and norm > limit:
                    factor = correction * (limit / (norm + _EPSILON))
        if isinstance(factor, Tensor) or factor != 1.0:
            gradients.multiply(factor)
        if self.settings.clip_value is not None:
            gradients.clamp(self.settings.clip_value)

    def _step(self) -> None:
        stall = None
        # In three steps in a row of every fifty: what is looked for lasts. Not where roundings are made up for.
        if self._may_stall and self.steps % _LOOK_EVERY < 3:
            if self._stall is None:
                self._stall = StallWatch(self.named())
            stall = self._stall if self._stall.sees_anything else None
        if stall is not None:
            stall.before()
        for optimizer in self._optimizers:
            self.attached.step(optimizer)
        if stall is not None:
            stall.after()
            if self.steps % _LOOK_EVERY == 2 and (found := stall.found()) is not None:
                self._may_stall = False
                warnings.warn(f"the bf16 stall: {found}", stacklevel=4)

    def _count(self, found_inf: bool, skipped: bool) -> None:
        if not skipped:
            self.steps += 1
            self.skips_in_a_row = 0
        elif found_inf:
            self.skips_in_a_row += 1
            if self.skips_in_a_row >= _SKIPS:
                raise NonFiniteGradient(
                    f"{_SKIPS} steps in a row were skipped",
                    what="each had a NaN or inf gradient, and nothing has been updated since",
                    fix='Step(..., on_nonfinite="raise") names the parameter; gradctl explain names the line',
                )

    def _nonfinite(self) -> NonFiniteGradient:
        bad: list[str] = []
        for index, parameter in enumerate(self.attached.stepped()):
            gradient = parameter.grad
            if gradient is None:
                continue
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            if not bool(torch.isfinite(values).all()):
                bad.append(self._names.get(id(parameter), f"parameter {index}"))
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        return NonFiniteGradient(
            f"the gradient of {bad[0] if bad else 'a parameter'}{more} is NaN or inf",
            what=f"in step {self.steps + 1}; nothing was updated, and the gradients are still there",
            fix="gradctl explain names the line that made it",
        )


def _last_operation(loss: Tensor) -> str:
    return "a constant" if loss.grad_fn is None else loss.grad_fn.name()


def counted(items: Any) -> float | None:
    """Return a count that was given, or None."""
    return None if items is None else as_count(items)
