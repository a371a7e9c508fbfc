"""Optimizers and schedulers that a framework has wrapped: taken as they are, taken out, or refused."""

from __future__ import annotations

import sys
from typing import Any

from gradctl._errors import UsageError


def check_model(model: Any) -> None:
    """Refuse what keeps the order of a step itself.

    Raises:
        UsageError: a `transformers.Trainer`, a Lightning module with automatic optimization, or a model that
            reduces gradients over processes.
    """
    kind = type(model)
    if any(base.__name__ == "Trainer" and base.__module__.startswith("transformers") for base in kind.__mro__):
        raise UsageError(
            f"Step({kind.__name__})",
            what="transformers.Trainer accumulates, clips, steps and schedules itself; it calls nothing in between",
            fix="a loop of your own with Step(trainer.model, ...), or the Trainer without Step",
        )
    if getattr(model, "automatic_optimization", None) is True and hasattr(model, "configure_optimizers"):
        raise UsageError(
            f"{kind.__name__} lets Lightning optimize (automatic_optimization is True)",
            what="Lightning would zero, run the backward, clip and step a second time",
            fix="self.automatic_optimization = False in its __init__, and Step in training_step",
        )
    if kind.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel") and _world_size() > 1:
        raise UsageError(
            f"Step({kind.__name__}) in {_world_size()} processes",
            what="it averages over processes as if each had the same number of items, and reduces every microbatch",
            fix="until Step counts over processes: one process, or a loop of your own",
        )


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer to step: accelerate's wrapper is taken off, Lightning's counts steps and stays.

    Raises:
        UsageError: the wrapper scales the loss or accumulates itself.
    """
    name, module = type(optimizer).__name__, type(optimizer).__module__
    if name == "AcceleratedOptimizer" and module.startswith("accelerate"):
        if optimizer.scaler is not None:
            raise UsageError(
                "the Accelerator scales the loss (mixed_precision='fp16')",
                what="AcceleratedOptimizer.step would unscale and step on its own",
                fix='Accelerator() without mixed precision, and Step(..., precision="fp16-scaled")',
            )
        steps = getattr(optimizer.gradient_state, "num_steps", 1)
        if steps != 1:
            raise UsageError(
                f"the Accelerator accumulates {steps} microbatches",
                what="both would count, and Accelerator.backward divides by that number",
                fix=f"Accelerator() without gradient_accumulation_steps, and Step(..., accumulate={steps})",
            )
        return optimizer.optimizer
    if hasattr(optimizer, "toggle_model") and hasattr(optimizer, "_strategy"):
        scaler = getattr(getattr(optimizer._strategy, "precision_plugin", None), "scaler", None)
        if scaler is not None:
            raise UsageError(
                "Lightning scales the loss (precision='16-mixed')",
                what="its optimizer's step would unscale and step on its own",
                fix='Trainer(precision="32-true"), and Step(..., precision="fp16-scaled")',
            )
    return optimizer


def _world_size() -> int:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())
