"""The callback for Lightning."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:  # the older distribution, `pytorch-lightning`
    from pytorch_lightning.callbacks import Callback  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

from gradctl._integrations._first_steps import FirstSteps


class ExplainLightning(Callback):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """Traces the first optimizer steps of a Lightning training, and says what is wrong with the gradients.

    `Trainer(callbacks=[gradctl.callbacks.ExplainLightning(stop=True)])`. After the traced steps training goes on at
    full speed. An error of a step is explained too, and goes on.

    Args:
        steps: how many optimizer steps are traced.
        stop: raise `BrokenGradients`, which names file and line, when they show an error.
        quiet: print nothing to stderr.

    Raises:
        UsageError: `steps` is no whole number above 0.
    """

    def __init__(self, *, steps: int = 3, stop: bool = False, quiet: bool = False) -> None:
        super().__init__()
        self._first = FirstSteps(steps, stop, quiet)

    @property
    def findings(self) -> Any:
        """What was found; empty until the traced steps are over."""
        return self._first.findings

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to trace."""
        self._first.begin(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report after the traced steps."""
        self._first.look()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop tracing a training that was shorter than that."""
        self._first.end(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Explain the error that ends the training."""
        self._first.end(exception)
