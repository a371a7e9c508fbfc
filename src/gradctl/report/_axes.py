"""Scales, ticks and numbers of the report's charts: plain arithmetic, nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HUGE = 1e300
"""Largest magnitude that is drawn: differences of two such values are still finite."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Map values to pixels, linearly or by their logarithm; what lies outside is clamped to the edge.

    Attributes:
        lo: value drawn at pixel `start`.
        hi: value drawn at pixel `end`.
        start: pixel of `lo`.
        end: pixel of `hi`.
        log: True draws equal ratios as equal distances; `lo` and `hi` are then above 0.
    """

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of `value`, clamped to the scale; NaN stays NaN."""
        if math.isnan(value):
            return math.nan
        lo, hi = self.lo, self.hi
        if self.log:
            value = math.log10(value) if value > 0 else -math.inf
            lo, hi = math.log10(lo), math.log10(hi)
        share = (min(max(value, lo), hi) - lo) / (hi - lo) if hi > lo else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 4) -> list[float]:
        """Return at most `most` round values inside the scale."""
        return log_ticks(self.lo, self.hi, most) if self.log else linear_ticks(self.lo, self.hi, most)


def linear_ticks(lo: float, hi: float, most: int = 4) -> list[float]:
    """Return at most `most` multiples of 1, 2 or 5 times a power of ten between `lo` and `hi`."""
    if not (math.isfinite(lo) and math.isfinite(hi)) or hi <= lo:
        return [lo] if math.isfinite(lo) else []
    magnitude = math.floor(math.log10((hi - lo) / most))
    for power in (magnitude, magnitude + 1):
        for factor in (1, 2, 5):
            gap = factor * 10.0**power
            first, last = math.ceil(lo / gap - 1e-9), math.floor(hi / gap + 1e-9)
            if last - first < most:
                return [_clean(k * gap) for k in range(first, last + 1)]
    return [lo]


def log_ticks(lo: float, hi: float, most: int = 4) -> list[float]:
    """Return at most `most` round values between `lo` and `hi`, both above 0, spread by ratio."""
    if not 0 < lo < hi or not math.isfinite(hi):
        return [lo] if lo > 0 and math.isfinite(lo) else []
    first, last = math.ceil(math.log10(lo) - 1e-9), math.floor(math.log10(hi) + 1e-9)
    powers = range(first, last + 1)
    if len(powers) >= 2:
        every = math.ceil(len(powers) / most)
        return [10.0**k for k in powers if k % every == 0][:most] or [10.0 ** powers[0]]
    between = [f * 10.0**k for k in range(first - 1, last + 1) for f in (1, 2, 5) if lo <= f * 10.0**k <= hi]
    return between[:most] if len(between) >= 2 else linear_ticks(lo, hi, most)


def step_ticks(last: int, most: int = 4) -> list[int]:
    """Return at most `most` step numbers for an axis from step 1 to `last`: round ones, and the last step."""
    if last <= most:
        return list(range(1, last + 1))
    for power in range(len(str(last)) + 1):
        for tenths in (10, 20, 25, 50):
            gap, rest = divmod(tenths * 10**power, 10)
            inner = (last * 9 // 10) // gap
            if rest == 0 and inner < most:
                return [*(gap * k for k in range(1, inner + 1)), last]
    raise AssertionError("unreachable: a gap above the last step leaves no tick between")


def fit(values: Iterable[float], start: float, end: float, *, keep: Sequence[float] = ()) -> tuple[Scale, bool, bool]:
    """Choose a scale for a curve so that a few outliers do not flatten it.

    Args:
        values: what will be drawn; NaN is passed over, infinities are clamped.
        start: pixel of the lower end.
        end: pixel of the upper end.
        keep: values that must stay inside, such as the first and the last.

    Returns:
        The scale, whether values lie above it, and whether values lie below it. It is logarithmic when all values
        are above 0 and the bulk of them spans more than a factor of 30.
    """
    ordered = sorted(min(max(v, -HUGE), HUGE) for v in values if not math.isnan(v))
    if not ordered:
        return Scale(0.0, 1.0, start, end), False, False
    beside = (
        max(2, len(ordered) // 50) if len(ordered) >= 8 else 0
    )  # a stretch gives two values, and one may be an outlier
    low, high = ordered[beside], ordered[-1 - beside]
    inside = [v for v in keep if math.isfinite(v) and abs(v) <= HUGE]
    if inside:
        low, high = min(low, *inside), max(high, *inside)
    log = low > 0 and math.log10(high) - math.log10(low) > math.log10(30)
    if log:
        scale = _spread(*(math.log10(max(v, 1 / HUGE)) for v in (low, high, ordered[0], ordered[-1])), edge=0.04)
        lo, hi = (10.0 ** max(-300.0, min(300.0, v)) for v in scale)
    else:
        lo, hi = _spread(low, high, ordered[0], ordered[-1], edge=0.06)
    return Scale(lo, hi, start, end, log), ordered[-1] > hi, ordered[0] < lo


def _spread(low: float, high: float, lowest: float, highest: float, *, edge: float) -> tuple[float, float]:
    """Widen the bulk of the values to the extremes where those are near, and leave a little room."""
    near = 0.6 * (high - low)
    low, high = (lowest if lowest >= low - near else low), (highest if highest <= high + near else high)
    room = edge * (high - low) or abs(high) * 0.1 or 0.5
    return low - room, high + room


def short(value: float | None) -> str:
    """Write a number with three significant digits: `4.43`, `0.0003`, `1.63e+04`, `NaN`."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    text = f"{abs(value):.3g}"
    return f"−{text}" if value < 0 else text


def tick_text(value: float) -> str:
    """Write an axis label that is short enough for the gutter: `100`, `0.5`, `1e4`, `1e-6`."""
    size = abs(value)
    if value == 0:
        return "0"
    sign = "−" if value < 0 else ""
    if 1e-3 <= size < 1e4:
        return f"{sign}{size:.5g}"
    mantissa, _, exponent = f"{size:.2e}".partition("e")
    return f"{sign}{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count_text(number: int) -> str:
    """Write a whole number with thin spaces between thousands."""
    return f"{number:,}".replace(",", "\u202f") if abs(number) >= 10_000 else str(number)


def bytes_text(number: float) -> str:
    """Write a number of bytes in the unit a person would use: `64 MiB`, `4.1 MiB`, `512 B`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1023.5 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" or abs(number) >= 9.95 else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable: the last unit takes everything")


def seconds_text(seconds: float) -> str:
    """Write a duration: `0.42 s`, `131 s`, `12 min`, `3.4 h`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 599:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_940 else f"{seconds / 3600:.1f} h"


def milliseconds_text(milliseconds: float) -> str:
    """Write a time in milliseconds: `0.31 ms`, `3.1 ms`, `319 ms`, `12.0 s`."""
    if milliseconds <= 0:
        return "0 ms"
    if milliseconds >= 9_995:
        return f"{milliseconds / 1000:.1f} s"
    return f"{milliseconds:.{2 if milliseconds < 0.995 else 1 if milliseconds < 99.5 else 0}f} ms"


def _clean(value: float) -> float:
    return float(f"{value:.12g}")
