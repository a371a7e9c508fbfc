"""From float32 to bfloat16 and back, without losing what is in between.

A bfloat16 is the upper half of a float32, so that both roundings here are sums of whole numbers: what is added to the
lower half carries into the upper one, or not. Sign and magnitude are apart in both, so that this holds for negative
numbers as well. All functions work in place on flat, contiguous float32 tensors; what they leave has a lower half of
zeros, and casting it to bfloat16 is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF = 1 << 15
_UPPER_HALF = -(1 << 16)


def round_stochastically(values: Tensor, generator: torch.Generator) -> None:
    """Round to one of the two neighbouring bfloat16 numbers, so that the expected value is the number itself.

    Upward with the probability (x - lower) / (upper - lower); what is a bfloat16 already stays as it is.

    Args:
        values: float32 [n].
        generator: of the device of `values`.
    """
    bits = _bits(values)
    # Four draws of 16 bits from one of 64: drawing costs more than all that follows.
    drawn = torch.empty(-(-bits.numel() // 4), dtype=torch.int64, device=bits.device)
    drawn.random_(-(1 << 63), None, generator=generator)
    bits.add_(drawn.view(torch.int16)[: bits.numel()]).add_(_HALF)  # together: even on 0 ... 65535
    bits.bitwise_and_(_UPPER_HALF)


def split(values: Tensor, *, lower: Tensor) -> None:
    """Round to the nearest bfloat16, and keep what that took off: `join` gives the same bits back.

    Args:
        values: float32 [n]; of two equally near numbers the one of larger magnitude is taken.
        lower: int16 [n], becomes the difference, in units of the last place of float32.
    """
    bits = _bits(values)
    lower.copy_((bits << 16).bitwise_right_shift_(16))
    bits.add_(_HALF).bitwise_and_(_UPPER_HALF)


def join(values: Tensor, lower: Tensor) -> None:
    """Add what `split` took off.

    That is at most half a unit in the last place of the bfloat16, whatever this has become meanwhile: a weight that was
    changed by hand is what was written, within its own rounding.

    Args:
        values: float32 [n], each a bfloat16.
        lower: int16 [n].
    """
    # A zero has nothing below it: what is left over from another weight would make it NaN.
    values.view(torch.int32).add_(torch.where(values == 0, lower.clamp_min(0), lower))


def _bits(values: Tensor) -> Tensor:
    # On a GPU NaN is 0x7fffffff: a carry would make it -0.0. This makes it 0x7fc00000, which has room.
    return values.nan_to_num_(math.nan, math.inf, -math.inf).view(torch.int32)
