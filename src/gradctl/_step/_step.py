"""What a program holds: `gradctl.Step`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradctl._errors import UnfinishedStep, UsageError
from gradctl._precision import Mode, Precision
from gradctl._precision import precision as precision_of
from gradctl._step._in_backward import refuse_foreign, refuse_in_backward
from gradctl._step._order import Order, counted
from gradctl._step._plain import AsItIs
from gradctl._step._result import StepResult
from gradctl._step._resume import load_state, state_of
from gradctl._step._settings import Average, Clip, OnNonFinite, Update, all_optimizers, one_model, settings
from gradctl._step._weights import Items, Reduction, check_microbatches, items_of


class Step:
    """Makes optimizer steps: accumulation, precision, clipping, skipping and schedules in the one order that is right.

    The gradient of a step is that of one big batch, however it is cut into microbatches: each is weighed by its items
    (rows, tokens, ...), empty ones count nothing, and a last step with fewer microbatches is divided by what it holds.

        step = gradctl.Step(model, optimizer, accumulate=4, precision="bf16-autocast", clip=1.0, scheduler=scheduler)
        for result in step.epoch(loader, lambda batch: cross_entropy(model(batch[0]), batch[1])):
            print(result.loss, result.grad_norm)

    or piece by piece, in a loop of your own:

        for x, y in loader:
            with step.forward():
                loss = cross_entropy(model(x), y)
            step.backward(loss)
            if step.ready:
                result = step.update()
        step.flush()                      # what is left at the end of an epoch

    Gradients can be read until the next `forward`, which drops them. A step that was skipped changes nothing but the
    loss scale: no optimizer, no schedule, no average. As a context manager it takes the precision back at the end of
    the block.

    Args:
        model: the model, or a list of models.
        optimizer: one, or a list of them: all step, or none.
        accumulate: microbatches of a step.
        precision: a mode or a description by `gradctl.precision`; None: the program's own. Attached until `remove`.
        clip: limit of the gradient norm over all optimizers, in units of the unscaled loss; ("value", limit) limits
            every element; inf only measures.
        scheduler: one or several with `step()`, stepped after each step that was not skipped.
        items: what a microbatch is weighed by: "rows" (first dimension of its tensors), "tokens" (labels that are not
            -100: the last tensor of a tuple, or the entry "labels"), or a function of the microbatch. None: what the
            loss itself says that it was divided by, where its last operation is a mean, `mse_loss`, `nll_loss`,
            `cross_entropy` or the like.
        loss: whether a loss is the mean or the sum over its microbatch.
        on_nonfinite: what a NaN or inf gradient does: "skip" the step, "raise" (names the parameter), or "continue"
            with it, as a plain loop does. Looking costs a gradient norm; None looks, and skips, where one is measured
            anyway: with a norm to clip by or a loss scale.
        average: a `torch.optim.swa_utils.AveragedModel`, or a function of the model; called after steps that were not
            skipped.
        update: "in-backward" updates each parameter as soon as its gradient is there, and drops the gradient.

    Raises:
        UsageError: an argument that would do something else than it says; nothing was changed.
        PrecisionRefused: this model or optimizer cannot have this precision; nothing was changed.
    """

    def __init__(
        self,
        model: Module | Iterable[Module],
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        accumulate: int = 1,
        precision: Precision | Mode | None = None,
        clip: Clip | None = None,
        scheduler: Any = None,
        items: Items | None = None,
        loss: Reduction = "mean",
        on_nonfinite: OnNonFinite | None = None,
        average: Average | Any = None,
        update: Update = "after-backward",
    ) -> None:
        whole = one_model(model)
        optimizers = all_optimizers(optimizer, whole)
        described = _precision(precision)
        scaled = described is not None and described.scaling is not None
        chosen = settings(
            accumulate=accumulate,
            items=items,
            loss=loss,
            clip=clip,
            on_nonfinite=on_nonfinite,
            scheduler=scheduler,
            average=average,
            update=update,
            optimizers=optimizers,
            scaled=scaled,
        )
        if described is not None and scaled and on_nonfinite not in (None, "skip"):
            raise UsageError(
                f'precision="{described.mode}" with on_nonfinite="{on_nonfinite}"',
                what="a loss scale finds its size by steps that overflow and are skipped",
                fix='on_nonfinite="skip": fifty skips in a row raise NonFiniteGradient',
            )
        names = {id(parameter): name for name, parameter in whole.named_parameters()}
        refuse_foreign(chosen, described, AsItIs(optimizers).stepped(), names)
        if update == "in-backward":
            refuse_in_backward(chosen, described, optimizers)
        self._model = whole
        self._optimizers = optimizers
        self._attached = AsItIs(optimizers) if described is None else described.attach(whole, *optimizers)
        given = model if isinstance(model, Module) else whole
        self._order = Order(chosen, self._attached, optimizers, given, names)
        self._settings = chosen
        self._removed = False
        self._goodbye = weakref.finalize(self, _left_over, self._order)

    # -- a whole step --------------------------------------------------------------------------------------------------

    def __call__(self, microbatches: Iterable[Any], loss_fn: Callable[[Any], Tensor]) -> StepResult:
        """Make one step.

        Args:
            microbatches: at most `accumulate` of them, each as `loss_fn` wants it; fewer at the end of an epoch.
            loss_fn: computes the loss of a microbatch, a tensor with one element; not called for an empty one.

        Returns:
            What the step did.

        Raises:
            UnfinishedStep: microbatches of an earlier step are waiting.
            NonFiniteGradient: see `on_nonfinite`.
            UsageError: the microbatches or their losses are not what was told.
        """
        self._check_nothing_waits()
        batches = check_microbatches(microbatches, self._settings.accumulate)
        rule = self._settings.items
        counts = [None if rule is None else items_of(rule, batch) for batch in batches]
        known = sum(count for count in counts if count is not None)
        if rule is not None and known:
            self._order.so_far.divisor = known  # counted beforehand: nothing is left to correct
        try:
            for batch, count in zip(batches, counts, strict=True):
                if count == 0:
                    self._order.backward(None, 0.0)
                    continue
                with self.forward():
                    loss = loss_fn(batch)
                self._order.backward(loss, count)
        except BaseException:
            self._order.forget()  # a part of a step is none; the next one zeroes what it has left
            raise
        return self._order.update()

    def epoch(self, loader: Iterable[Any], loss_fn: Callable[[Any], Tensor]) -> Iterator[StepResult]:
        """Make all steps of an epoch, the last one with as many microbatches as are left.

        Args:
            loader: yields microbatches.
            loss_fn: computes the loss of a microbatch.

        Yields:
            What each step did.

        Raises:
            UnfinishedStep: microbatches of an earlier step are waiting.
        """
        self._check_nothing_waits()
        batches: list[Any] = []
        for batch in loader:
            batches.append(batch)
            if len(batches) == self._settings.accumulate:
                yield self(batches, loss_fn)
                batches = []
        if batches:
            yield self(batches, loss_fn)

    # -- piece by piece ------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether all microbatches of the step are there, so that `update` is next."""
        return self._order.so_far.microbatches >= self._settings.accumulate

    def forward(self) -> AbstractContextManager[Any]:
        """Compute the loss of a microbatch inside of this block; the backward comes after it.

        Raises:
            UnfinishedStep: all microbatches are there, and `update` was not called.
        """
        self._check_not_ready()
        self._order.zero()
        return self._attached.forward()

    def backward(self, loss: Tensor | None, *, items: int | float | Tensor | None = None) -> None:
        """Run the backward of one microbatch.

        Args:
            loss: a tensor with one element; of a microbatch without items it is not looked at.
            items: how much this microbatch counts; None: as its loss says. Needed where the loss does not say it.

        Raises:
            UnfinishedStep: all microbatches are there, and `update` was not called.
            UsageError: the loss is not what was told, or cannot be weighed.
        """
        self._check_not_ready()
        self._order.backward(loss, counted(items))

    def update(self) -> StepResult:
        """Apply what was accumulated, once all microbatches are there.

        Returns:
            What the step did.

        Raises:
            UnfinishedStep: microbatches are missing.
            NonFiniteGradient: see `on_nonfinite`.
        """
        waiting, needed = self._order.so_far.microbatches, self._settings.accumulate
        if waiting < needed:
            raise UnfinishedStep(
                f"{waiting} of {needed} microbatches",
                what="update() was called before the step was complete",
                fix="if step.ready: step.update(); step.flush() at the end of an epoch",
            )
        return self._order.update()

    def flush(self) -> StepResult | None:
        """Apply what is left at the end of an epoch, divided by what it holds; None if nothing is.

        Raises:
            NonFiniteGradient: see `on_nonfinite`.
        """
        return self._order.update() if self._order.so_far.microbatches else None

    @property
    def loss_scale(self) -> float:
        """The loss scale; 1.0 without one."""
        return self._attached.loss_scale

    # -- keeping and taking back ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the state_dicts of model, optimizers and schedulers, as copies.

        Counts, loss scale, and in the middle of an accumulation the gradients so far: a run that is resumed there is
        bitwise the run that was not interrupted.
        """
        return state_of(self._order, self._settings)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, after model, optimizers and schedulers have loaded theirs.

        Raises:
            UsageError: it is that of other parameters, or of another `accumulate` in the middle of a step.
        """
        load_state(self._order, self._settings, state)

    def remove(self) -> None:
        """Take everything back: the precision, hooks. A second call does nothing.

        Raises:
            UnfinishedStep: microbatches were left; everything is taken back all the same.
        """
        if self._removed:
            return
        self._removed = True
        self._goodbye.detach()
        self._order.remove()
        if (left := self._order.so_far.microbatches) > 0:
            raise UnfinishedStep(
                f"{left} of {self._settings.accumulate} microbatches were never applied",
                what="Step was left in the middle of an accumulation",
                fix="step.flush() at the end of each epoch",
            )

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.remove()
        except UnfinishedStep:
            if error is None:  # an error that leaves the block has left the step unfinished
                raise

    def _check_nothing_waits(self) -> None:
        waiting = self._order.so_far.microbatches
        if waiting:
            raise UnfinishedStep(
                f"{waiting} of {self._settings.accumulate} microbatches are waiting",
                what="a whole step was asked for in the middle of one",
                fix="step.flush() first",
            )

    def _check_not_ready(self) -> None:
        if self._order.so_far.microbatches >= self._settings.accumulate:
            raise UnfinishedStep(
                f"all {self._settings.accumulate} microbatches are there, and none was applied",
                what="one more would be added to a step that is complete",
                fix="if step.ready: step.update()",
            )


def _precision(asked: Any) -> Precision | None:
    if asked is None or isinstance(asked, Precision):
        return asked
    if isinstance(asked, str):
        return precision_of(asked)  # pyright: ignore[reportArgumentType]
    raise UsageError(
        f"precision={type(asked).__name__}",
        what="a mode, gradctl.precision(...), or None",
        fix='precision="fp16-scaled" in place of a GradScaler',
    )


def _left_over(order: Order) -> None:
    left = order.so_far.microbatches
    if left:
        warnings.warn(
            f"{left} of {order.settings.accumulate} microbatches were accumulated and never applied: "
            "step.flush() at the end of each epoch",
            stacklevel=2,
        )
