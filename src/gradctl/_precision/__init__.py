"""Precision: which numbers the forward uses, which the weights are kept in, and what is done so that none is lost.

`precision(...)` describes, `Precision.attach(model, *optimizers)` acts and returns an `Attached`, which takes all of it
back. The modes differ in two decisions only, each in a file of its own:

- what the forward computes in: `_attached.py` enters autocast, `_overrides.py` keeps chosen modules in float32;
- how weights are stored: as they are; in float32 with 16-bit copies while a forward and its backward run
  (`_masters.py`); in 16 bits, widened while the optimizer steps (`_sixteen.py`, rounding in `_rounding.py`).

The loss scale is in `_loss_scale.py`, what is refused in `_refusals.py`, and the measure of updates that round to
nothing in `_stall.py`.
"""

from __future__ import annotations

from gradctl._precision._attached import Attached
from gradctl._precision._mode import Mode, Precision, precision
from gradctl._precision._stall import Stall, StallWatch

__all__ = ["Attached", "Mode", "Precision", "Stall", "StallWatch", "precision"]
