"""The loss, as it was passed to backward, with a GradScaler's scale undone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradctl._record._faults import Faults
from gradctl._record._gradients import local_part
from gradctl._record._hot import Hot
from gradctl._record._quiet import Quiet, is_capturing, is_here


class Losses:
    """Reads losses that are not a plain number on the CPU.

    Args:
        hot: the slots that the engine's wrap looks at.
        faults: where our own faults go.
        bad: called for a loss that is NaN or inf.
    """

    def __init__(self, hot: Hot, faults: Faults, bad: Callable[[], None]) -> None:
        self._hot = hot
        self._faults = faults
        self._bad = bad
        self.off = False

    def bad(self) -> None:
        """Pass on that a loss is NaN or inf."""
        if not self.off:
            self._bad()

    def read(self, loss: Any) -> Any:
        """Return a float, a pair (tensor, scale) to be read at the drain, or None if there is no scalar to read."""
        pending = self._hot.scaled.pop(threading.get_ident(), None) if self._hot.scaled else None
        if self.off or not isinstance(loss, Tensor):
            return None
        with Quiet():
            scale: Any = 1.0
            if pending is not None and pending[0] == id(loss):
                value = pending[1]
                if isinstance(value, float):
                    return value
                loss = value
            elif pending is not None:
                # Something was done to the scaled loss, such as a division by the number of microbatches.
                scale = pending[2]
            local = local_part(loss)
            if local is None or local.numel() != 1:
                return None
            if is_here(local):
                return float(local) / float(scale)
            if is_capturing():
                return None
            return local.detach(), scale if isinstance(scale, float) else scale.clone()

    def scale_wrap(self, inner: Any) -> Any:
        """The wrap of `GradScaler.scale`: remembers what the loss was before it was scaled."""

        def scale(scaler: Any, outputs: Any) -> Any:
            result = inner(scaler, outputs)
            if result is not outputs and isinstance(result, Tensor):
                try:
                    self._remember(scaler, outputs, result)
                except Exception as error:
                    self._faults.caught("backward", error)
            return result

        return scale

    def _remember(self, scaler: Any, outputs: Tensor, result: Tensor) -> None:
        if type(outputs) is not Tensor or outputs.numel() != 1:
            return
        factor = scaler._scale
        with Quiet():
            if is_here(outputs):
                kept: Any = float(outputs)
                factor = float(factor)
            else:
                kept = outputs.detach()
        self._hot.scaled[threading.get_ident()] = (id(result), kept, factor)
