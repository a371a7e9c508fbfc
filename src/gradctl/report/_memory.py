"""The section on one step's memory: its course as stacked areas, and where the bytes of the peak are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gradctl._journal import Journal
from gradctl.report._axes import Scale, bytes_text, linear_ticks
from gradctl.report._svg import band_data, element, line, text

CATEGORIES = ("weights", "gradients", "optimizer state", "inputs", "saved", "temporary")
MOST_PLACES = 8
MOST_MOMENTS = 400
_LARGEST = 1 << 60
_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDTH, _HEIGHT = 74, 1068, 26, 226, 1080, 246
_WORD = 64


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes at one place."""

    what: str
    where: str
    size: str
    share: float


@dataclass(frozen=True, slots=True)
class MemorySection:
    """What the page says of the memory of one step."""

    step: int
    peak: str
    device: str
    at: str
    svg: Markup
    parts: tuple[tuple[str, str, str, int], ...]
    alive: tuple[Row, ...]
    saved: str
    lines: tuple[Row, ...]
    notes: tuple[str, ...]


def section(journal: Journal) -> MemorySection | None:
    """Return the section of the last step that was measured; None if there is none, or it cannot be read."""
    events = journal.named("memory")
    if not events:
        return None
    try:
        return _section(events[-1].n or 0, events[-1].data)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return None  # a journal that somebody else has written


def _section(step: int, data: Mapping[str, Any]) -> MemorySection | None:
    peak, saved = _whole(data["peak_bytes"]), _whole(data["saved_bytes"])
    at_peak = _sizes(data["at_peak"])
    moments = [
        (float(one["seconds"]), str(one["phase"]), _sizes(one["nbytes"])) for one in data["moments"][:MOST_MOMENTS]
    ]
    if not moments or not all(math.isfinite(one[0]) for one in moments):
        return None
    place = " ".join(filter(None, (str(data["peak_module"]), str(data["peak_line"]))))
    alive = [
        (str(one["category"]), " ".join(filter(None, (str(one["module"]), str(one["line"])))), _whole(one["nbytes"]))
        for one in data["alive"]
        if one["category"] in ("saved", "temporary", "gradients")
    ]
    lines = [("", str(one["where"]), _whole(one["nbytes"])) for one in data["saved_by_line"]]
    return MemorySection(
        step=step,
        peak=bytes_text(peak),
        device=str(data["device"]),
        at=f"{data['peak_phase']}, {data['peak_operation']}" + (f", {place}" if place else ""),
        svg=_draw(moments, peak),
        parts=tuple(
            (name, bytes_text(size), f"{size / peak:.0%}" if peak else "", k)
            for k, (name, size) in enumerate(zip(CATEGORIES, at_peak, strict=True))
            if size
        ),
        alive=_rows(alive),
        saved=bytes_text(saved),
        lines=_rows(lines),
        notes=tuple(_notes(data)),
    )


def _notes(data: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    if head := _whole(data["head_saved_bytes"]):
        found.append(
            f"What comes after the last layer with weights, the loss, saves {bytes_text(head)}; with that layer's"
            f" output it has {bytes_text(_whole(data['head_peak_bytes']))} of the peak."
        )
    kinds: dict[str, int] = {}
    for one in data["avoidable"]:
        kinds[str(one["kind"])] = kinds.get(str(one["kind"]), 0) + _whole(one["nbytes"])
    words = {
        "dead": "saved although no gradient needs them",
        "duplicate": "saved twice: equal to others that are saved",
        "weight copy": "repeated copies of weights",
    }
    found += [f"{bytes_text(size)} are {words[kind]}." for kind, size in kinds.items() if kind in words]
    return [*found, *(f"{str(remark).capitalize()}." for remark in data["remarks"])][:8]


def _rows(found: Sequence[tuple[str, str, int]]) -> tuple[Row, ...]:
    largest = max((size for *_, size in found), default=0) or 1
    shown = [one for one in found if one[2]][:MOST_PLACES]
    return tuple(Row(what, where, bytes_text(size), round(size / largest * 100, 1)) for what, where, size in shown)


def _draw(moments: Sequence[tuple[float, str, list[int]]], peak: int) -> Markup:
    begin, end = moments[0][0], max(one[0] for one in moments)
    top = max(peak, max(sum(sizes) for _, _, sizes in moments)) or 1
    across, down = Scale(begin, end if end > begin else begin + 1, _LEFT, _RIGHT), Scale(0, top * 1.04, _BOTTOM, _TOP)
    parts: list[Markup] = [element("title", "Bytes over the step, by what they are")]
    for tick in linear_ticks(0, top / _unit(top), 4):
        y = down(tick * _unit(top))
        parts += [
            line(_LEFT, y, _RIGHT, y, "grid"),
            text(bytes_text(tick * _unit(top)), _LEFT - 8, y + 4, anchor="end"),
        ]
    xs = [across(seconds) for seconds, _, _ in moments]
    below = [0] * len(moments)
    for k in range(len(CATEGORIES)):
        above = [low + sizes[k] for low, (_, _, sizes) in zip(below, moments, strict=True)]
        if above != below:
            data = band_data(xs, [down(low) for low in below], [down(high) for high in above])
            parts.append(element("path", d=data, class_=f"m{k}"))
        below = above
    parts += _phases(moments, xs)
    at = max(range(len(moments)), key=lambda k: sum(moments[k][2]))
    y = down(sum(moments[at][2]))
    parts += [
        element("circle", cx=xs[at], cy=y, r=3, class_="peak"),
        text(f"peak {bytes_text(peak)}", xs[at] + (8 if xs[at] < 900 else -8), y - 6, "value",
             anchor="end" if xs[at] >= 900 else None),
    ]  # fmt: skip
    return element(
        "svg", *parts, class_="chart memory", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img",
        aria_label=f"Memory over the step; the peak is {bytes_text(peak)}",
    )  # fmt: skip


def _phases(moments: Sequence[tuple[float, str, list[int]]], xs: Sequence[float]) -> list[Markup]:
    """Mark where forward, backward and the optimizer's step begin; those with room for their word get it."""
    found: list[Markup] = []
    start = 0
    for k in range(1, len(moments) + 1):
        if k < len(moments) and moments[k][1] == moments[start][1]:
            continue
        if start:
            found.append(line(xs[start], _TOP, xs[start], _BOTTOM, "axis"))
        until = xs[k] if k < len(moments) else float(_RIGHT)
        if until - xs[start] >= _WORD:
            found.append(text(moments[start][1][:12], xs[start] + 4, _HEIGHT - 4))
        start = k
    return found[:60]


def _unit(top: int) -> int:
    unit = 1
    while top / unit >= 1024 and unit < 1 << 40:
        unit <<= 10
    return unit


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError("no size")
    return value


def _sizes(value: Any) -> list[int]:
    found = [_whole(size) for size in value]
    if len(found) != len(CATEGORIES):
        raise ValueError("not one size for each category")
    return found
