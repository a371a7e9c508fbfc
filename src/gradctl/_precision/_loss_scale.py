"""The loss scale: `torch.amp.GradScaler`'s rule, with one `found_inf` for all optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradctl import _torch_private as private
from gradctl._journal import emit
from gradctl._precision._mode import LossScaling


class LossScale:
    """Scales losses, unscales gradients, and moves the scale.

    The scale and the count of finite steps are numbers of the host: who decides whether to step has read `found_inf`
    already, so that nothing here waits for a device.

    Args:
        scaling: how the scale moves.
        device_type: kind of device of the losses.
    """

    def __init__(self, scaling: LossScaling, device_type: str) -> None:
        self._scaling = scaling
        self._device_type = device_type
        self.value = _float32(scaling.init_scale)
        self.finite_steps = 0
        self._set(self.value)

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply a loss by the scale."""
        return self._multiplier.scale(loss)

    def unscale(self, gradients: Iterable[Tensor], device: torch.device) -> Tensor:
        """Divide gradients by the scale in place; return whether any is inf or NaN, float32 [] on `device`."""
        return unscale(gradients, device, self._inverse)

    def update(self, found_inf: bool) -> None:
        """Move the scale after a step; a change is an event of the journal."""
        scaling, was = self._scaling, self.value
        if found_inf:
            self.finite_steps = 0
            self._set(_float32(was * scaling.backoff_factor))
        else:
            self.finite_steps += 1
            if self.finite_steps == scaling.growth_interval:
                self.finite_steps = 0
                grown = _float32(was * scaling.growth_factor)
                if math.isfinite(grown):
                    self._set(grown)
        if self.value != was:
            emit("loss_scale", scale=self.value, was=was, why="overflow" if found_inf else "growth")

    def note_skip(self, optimizer: Any) -> None:
        """Tell who listens to `GradScaler` that the update of `optimizer` is skipped."""
        maybe_step = private.find("scaler_maybe_step")
        if maybe_step is not None:
            device = torch.device("cpu")
            maybe_step(self._multiplier, optimizer, {"found_inf_per_device": {device: torch.ones((), device=device)}})

    def state_dict(self) -> dict[str, Any]:
        """Return scale and count, under the names that `GradScaler.state_dict` uses."""
        scaling = self._scaling
        return {
            "scale": self.value,
            "growth_factor": scaling.growth_factor,
            "backoff_factor": scaling.backoff_factor,
            "growth_interval": scaling.growth_interval,
            "_growth_tracker": self.finite_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over scale and count, also from a `GradScaler`; factors stay as they were asked for."""
        self.finite_steps = int(state["_growth_tracker"])
        self._set(_float32(float(state["scale"])))

    def _set(self, value: float) -> None:
        self.value = value
        # torch's own multiplies: its bits, its rules for devices, and what listens to it sees the loss and the scale.
        self._multiplier = torch.amp.GradScaler(self._device_type, init_scale=value)
        self._inverse = 1.0 / value  # in float64, as GradScaler: the reciprocal of a float32 need not be exact in it


def unscale(gradients: Iterable[Tensor], device: torch.device, inverse: float = 1.0) -> Tensor:
    """Multiply gradients by `inverse` in place and look for inf and NaN, without waiting for the device.

    Args:
        gradients: of any devices and dtypes; of sparse ones the values are taken.
        device: where the answer lies.
        inverse: one over the scale.

    Returns:
        1.0 if any gradient is inf or NaN, else 0.0; float32 [].
    """
    grouped: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        values = gradient._values() if gradient.is_sparse else gradient
        grouped.setdefault((values.device, values.dtype), []).append(values)
    kernel = private.get("unscale_kernel")
    found: Tensor | None = None
    with torch.no_grad():
        for (where, _), tensors in grouped.items():
            one = torch.zeros((), dtype=torch.float32, device=where)
            kernel(tensors, one, torch.full((), inverse, dtype=torch.float32, device=where))
            one = one.to(device, non_blocking=True)
            found = one if found is None else torch.maximum(found, one)
    return torch.zeros((), dtype=torch.float32, device=device) if found is None else found


def _float32(value: float) -> float:
    return float(np.float32(value))
