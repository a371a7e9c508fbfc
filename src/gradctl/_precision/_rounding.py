"""From float32 to bfloat16 and back, without losing what is in between.

A bfloat16 is the upper half of a float32, so that both roundings here are whole numbers: what is added to the lower
half carries into the upper one, or not. Signs are apart from magnitudes in both, so that this holds for negative
numbers as well. All functions work on flat tensors.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_HALF = 1 << 15
_UPPER = 1 if sys.byteorder == "little" else 0


def round_stochastically(values: Tensor, generator: torch.Generator, *, into: Tensor) -> None:
    """Round to one of the two neighbouring bfloat16 numbers, so that the expected value is the number itself.

    Upward with the probability (x - lower) / (upper - lower); what is a bfloat16 already stays as it is.

    Args:
        values: float32 [n], contiguous; overwritten.
        generator: of the device of `values`.
        into: bfloat16 [n].
    """
    bits = values.view(torch.int32)
    # Four draws of 16 bits from one of 64: drawing costs more than all that follows.
    drawn = torch.empty(-(-bits.numel() // 4), dtype=torch.int64, device=bits.device)
    drawn.random_(-(1 << 63), None, generator=generator)
    bits.add_(drawn.view(torch.int16)[: bits.numel()]).add_(_HALF)  # together: even on 0 ... 65535
    into.view(torch.int16).copy_(_upper_halves(bits))


def split(values: Tensor, *, upper: Tensor, lower: Tensor) -> None:
    """Round to the nearest bfloat16, and keep what that took off: `join` gives the same bits back.

    Args:
        values: float32 [n], contiguous; left as they are.
        upper: bfloat16 [n], becomes the nearest (of two equally near ones the larger magnitude).
        lower: int16 [n], becomes the difference, in units of the last place of float32.
    """
    bits = values.view(torch.int32)
    upper.view(torch.int16).copy_(_upper_halves(bits + _HALF))
    lower.copy_(bits.view(torch.int16).view(-1, 2)[:, 1 - _UPPER])


def join(upper: Tensor, lower: Tensor, *, into: Tensor) -> None:
    """Write the float32 numbers that `split` took apart into `into`, float32 [n], contiguous.

    The lower half is at most half a unit in the last place of the upper one, whatever that has become meanwhile: a
    weight that was changed by hand is changed to what was written, within its own rounding.
    """
    bits = into.view(torch.int32)
    bits.copy_(upper.view(torch.int16)).bitwise_left_shift_(16).add_(lower)


def _upper_halves(bits: Tensor) -> Tensor:
    return bits.view(torch.int16).view(-1, 2)[:, _UPPER]
