"""The callback for `transformers.Trainer`."""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer, TrainerCallback

from gradctl._integrations._first_steps import FirstSteps


class ExplainTransformers(TrainerCallback):
    """Traces the first optimizer steps of a `transformers.Trainer`, and says what is wrong with the gradients.

    `Trainer(..., callbacks=[gradctl.callbacks.ExplainTransformers(stop=True)])`. After the traced steps training goes
    on at full speed. An error of a step is explained too, and goes on.

    Args:
        steps: how many optimizer steps are traced.
        stop: raise `BrokenGradients`, which names file and line, when they show an error.
        quiet: print nothing to stderr.

    Raises:
        UsageError: `steps` is no whole number above 0.
    """

    def __init__(self, *, steps: int = 3, stop: bool = False, quiet: bool = False) -> None:
        self._first = FirstSteps(steps, stop, quiet)
        self._trainer: Any = None

    @property
    def findings(self) -> Any:
        """What was found; empty until the traced steps are over."""
        return self._first.findings

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin to trace."""
        self._first.begin(model)
        self._guard(_calling_trainer())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report after the traced steps."""
        try:
            self._first.look()
        finally:
            if not self._first.running:
                self._unguard()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop tracing a training that was shorter than that."""
        self._first.end(None)
        self._unguard()
        self._first.look()

    def _guard(self, trainer: Any) -> None:
        """See an error that leaves a step: the trainer tells its callbacks of none."""
        self._unguard()
        if trainer is None:
            return
        inner = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except BaseException as error:
                self._unguard()
                self._first.end(error)
                raise

        self._trainer = trainer
        trainer.training_step = training_step

    def _unguard(self) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            vars(trainer).pop("training_step", None)


def _calling_trainer() -> Any:
    """Return the trainer that calls the callback; None where none does, or it has a step of its own laid over it."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return None if "training_step" in vars(owner) else owner
        frame = frame.f_back
    return None
