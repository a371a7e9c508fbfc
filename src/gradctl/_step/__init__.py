"""One optimizer step: microbatches, loss scale, clipping, skipping and schedules in the one order that is right.

The order itself stands in `_order.py`, top to bottom, with the reason beside each line; `_step.py` is what a program
holds. What is refused before the first step is in `_settings.py`, how losses are weighed in `_weights.py`.
"""

from __future__ import annotations

from gradctl._step._result import StepResult
from gradctl._step._step import Step

__all__ = ["Step", "StepResult"]
