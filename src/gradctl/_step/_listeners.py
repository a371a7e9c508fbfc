"""Telling whoever records the run what torch's own functions would have told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradctl import _taps
from gradctl import _torch_private as private


def tell_clip(norm: float | Tensor, limit: float) -> None:
    """Tell those who listen to clipping by norm; nothing is clipped by it."""
    if _taps.clip.is_installed():
        clip = private.find("clip_with_norm")
        if clip is not None:
            clip([], limit, norm)


def tell_skip(optimizer: Any) -> None:
    """Tell those who listen to a loss scaler that an update is left out, where there is no scaler that could."""
    if _taps.scaler_step.is_installed():
        maybe_step = private.find("scaler_maybe_step")
        if maybe_step is not None:
            no_scaler: Any = SimpleNamespace(_scale=None)
            maybe_step(no_scaler, optimizer, {"found_inf_per_device": {torch.device("cpu"): torch.ones(())}})
