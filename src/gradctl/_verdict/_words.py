"""Numbers and lists as a sentence says them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float) -> str:
    """Three significant digits, NaN and infinities by name: 4.43, 0.0003, 1.63e+04."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share as percent: 18 %, 0.7 %; never 100 % for what is not all, nor 0 % for what is not nothing."""
    value = 100 * share
    if not math.isfinite(value):
        return "?"
    if 0 < value < 0.05:
        return "<0.1 %"
    if 99.5 <= value < 100:
        return ">99 %"
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.1f} %"


def size(count: float) -> str:
    """Bytes in binary units: 172 MiB, 4.1 MiB, 900 B."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1023.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 9.95 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB" if value < 1e6 else f"{value:.2g} TiB"


def milliseconds(value: float) -> str:
    """A time of one step: 319 ms, 2.2 ms, 0.24 ms, 1.5 s."""
    if value >= 999.5:
        return f"{value / 1000:.3g} s"
    return f"{value:.0f} ms" if value >= 99.5 else f"{value:.2g} ms" if value < 9.95 else f"{value:.3g} ms"


def seconds(value: float) -> str:
    """A time of a whole run: 131 s, 2 h 5 min, 0.8 s."""
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 600:
        return f"{value:.0f} s"
    if value < 36_000:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"


def count(how_many: int, noun: str, plural: str = "") -> str:
    """`1 step`, `2 steps`."""
    return f"{how_many} {noun if how_many == 1 else plural or noun + 's'}"


def named(names: Sequence[str], total: int, *, most: int = 3) -> str:
    """The first names and how many more: `a, b and 64 more`."""
    shown = list(names[:most])
    more = max(total, len(names)) - len(shown)
    if not shown:
        return ""
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
