"""Telling whoever records the run what torch's own functions would have told."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradctl import _taps
from gradctl import _torch_private as private


def clip_aloud(owners: Sequence[Tensor], norm: float, limit: float) -> bool:
    """Let torch clip where somebody listens to it, who hears norm, limit and parameters; False where nobody does.

    The factor is the same, and so are the bits.
    """
    if not _taps.clip.is_installed() or any(owner.grad is not None and owner.grad.is_sparse for owner in owners):
        return False
    clip = private.find("clip_with_norm")
    if clip is None:
        return False
    clip(list(owners), limit, torch.tensor(norm, dtype=torch.float64))
    return True


def tell_skip(optimizer: Any) -> None:
    """Tell those who listen to a loss scaler that an update is left out, where there is no scaler that could."""
    if _taps.scaler_step.is_installed():
        maybe_step = private.find("scaler_maybe_step")
        if maybe_step is not None:
            no_scaler: Any = SimpleNamespace(_scale=None)
            maybe_step(no_scaler, optimizer, {"found_inf_per_device": {torch.device("cpu"): torch.ones(())}})
