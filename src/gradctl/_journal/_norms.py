"""How gradient norms and ratios are coded in the journal."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

PACK_ABOVE = 500
"""Beyond this many tensors, norms are written as one byte each."""


def encode_norms(norms: Sequence[float | None]) -> list[int | str | None] | str:
    """Encode norms (or ratios) as hundredths of a decade: `round(100 * log10(norm))`, within 1.2 % of the value.

    Zero is -999, None (no gradient) null, NaN or inf "nan". Beyond `PACK_ABOVE` values: one byte each in base64, a
    twentieth of a decade, within 6 %.
    """
    if len(norms) > PACK_ABOVE:
        return base64.b64encode(bytes(_pack(norm) for norm in norms)).decode("ascii")
    return [_code(norm) for norm in norms]


def decode_norms(codes: Any) -> tuple[float | None, ...]:
    """Decode what `encode_norms` wrote: None, 0.0, nan or a positive float."""
    if isinstance(codes, str):
        return tuple(_UNPACKED[byte] for byte in base64.b64decode(codes, validate=True))
    return tuple(_decode(code) for code in codes)


def _code(norm: float | None) -> int | str | None:
    if norm is None:
        return None
    if norm == 0.0:
        return -999
    if not (math.isfinite(norm) and norm > 0):
        return "nan"
    code = round(100 * math.log10(norm))
    return code if code != -999 else -1000  # 1.02e-10 is small, not zero


def _decode(code: Any) -> float | None:
    if code is None:
        return None
    if isinstance(code, bool) or not isinstance(code, int | float) or code != code:
        return math.nan
    return 0.0 if code == -999 else 10.0 ** (max(-30000.0, min(30000.0, code)) / 100)


def _pack(norm: float | None) -> int:
    if norm is None:
        return 0
    if norm == 0.0:
        return 1
    if not (math.isfinite(norm) and norm > 0):
        return 255
    return min(254, max(2, round(20 * (math.log10(norm) + 8)) + 2))


def _unpack(byte: int) -> float | None:
    if byte == 0:
        return None
    if byte == 1:
        return 0.0
    return math.nan if byte == 255 else 10.0 ** ((byte - 2) / 20 - 8)


_UNPACKED = tuple(_unpack(byte) for byte in range(256))
