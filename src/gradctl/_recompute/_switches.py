"""Process-wide switches that choose the kernel of a product or convolution, and with it the last bits of the result."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

Switches = tuple[bool, str, tuple[bool, bool, bool]]
_HAS_CUDNN = torch.backends.cudnn.is_available()
_WITHOUT = (True, False, False)


def switches() -> Switches:
    """Return how they stand."""
    cudnn = torch.backends.cudnn
    on_gpu = (bool(cudnn.enabled), bool(cudnn.benchmark), bool(cudnn.deterministic)) if _HAS_CUDNN else _WITHOUT
    return bool(torch.backends.mkldnn.enabled), torch.get_float32_matmul_precision(), on_gpu


@contextmanager
def switched(to: Switches) -> Generator[None]:
    """Turn them as they stood, and back."""
    before = switches()
    _turn(to)
    try:
        yield
    finally:
        _turn(before)


def _turn(to: Switches) -> None:
    mkldnn, precision, on_gpu = to
    if bool(torch.backends.mkldnn.enabled) is not mkldnn:
        torch.backends.mkldnn.enabled = mkldnn
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)
    if _HAS_CUDNN:
        cudnn = torch.backends.cudnn
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = on_gpu
