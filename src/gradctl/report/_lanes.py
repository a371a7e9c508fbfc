"""The lanes of the chart of a run: loss, gradient norm, learning rate, events, and the heat map below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from gradctl._journal import Event
from gradctl.report import _heat
from gradctl.report._axes import Scale, count_text, fit, short, tick_text
from gradctl.report._heat import HeatMap
from gradctl.report._series import Curve, Trace
from gradctl.report._svg import band_data, element, line, path_data, shortened, text

LEFT, RIGHT = 172.0, 1062.0
POINTS = 420
LOSS = (16.0, 122.0)
NORM = (152.0, 224.0)
RATE = (256.0, 286.0)
EVENTS = 306.0
HEAT_TOP = 368.0
EVENT_LEVELS = {
    "nonfinite": "error", "error": "error", "skip": "warning", "stall": "warning", "torn_step": "warning",
    "fault": "note", "tier_off": "note", "off": "note", "accumulation": "note", "child": "note",
}  # fmt: skip
EVENT_WORDS = {
    "nonfinite": ("step with NaN or inf", "steps with NaN or inf"), "skip": ("skipped update", "skipped updates"),
    "stall": ("stalled update", "stalled updates"), "torn_step": ("torn step", "torn steps"),
    "error": ("exception", "exceptions"), "off": ("switch of gradients", "switches of gradients"),
    "accumulation": ("change of accumulation", "changes of accumulation"),
    "child": ("child process", "child processes"),
    "fault": ("fault of gradctl", "faults of gradctl"), "tier_off": ("tier switched off", "tiers switched off"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bad:
    """The non-finite values of a run, as the verdict counts them.

    Attributes:
        first: step of the first; drawn as one line through everything.
        steps: how many steps had one.
        lasting: whether they never ended.
    """

    first: int
    steps: int
    lasting: bool


def _lane_title(title: str, y: float, *subs: str) -> list[Markup]:
    return [text(title, 0, y, "title"), *(text(sub, 0, y + 16 + 15 * k) for k, sub in enumerate(subs) if sub)]


def _grid(scale: Scale) -> list[Markup]:
    parts: list[Markup] = []
    last = math.inf
    for tick in scale.ticks():
        y = scale(tick)
        if scale.end - 1 <= y <= scale.start + 1 and abs(last - y) >= 13:
            parts += [line(LEFT, y, RIGHT, y, "grid"), text(tick_text(tick), LEFT - 10, y + 4, anchor="end")]
            last = y
    return parts


def _pixels(curve: Curve, values: Sequence[float], axis: Scale, scale: Scale) -> tuple[list[float], list[float]]:
    return [axis(float(x)) for x in curve.x], [scale(float(v)) for v in values]


def loss_lane(seen: Trace, axis: Scale, bad_step: int | None) -> list[Markup]:
    """Draw the loss as it was passed to backward: every block faint, a centred mean strong, outliers off scale."""
    by = "a step is a backward" if seen.by_backward else "passed to backward"
    curve = seen.loss.thinned(POINTS, seen.last_step)
    if not curve.seen:
        return [
            *_lane_title("loss", LOSS[0] + 8, by),
            line(LEFT, LOSS[1], RIGHT, LOSS[1], "grid"),
            text("no finite loss was passed to backward" if seen.blocks else "no loss was seen", LEFT + 8, LOSS[1] - 8),
        ]
    first, last = seen.loss.first, seen.loss.last
    values = [float(v) for part in (curve.low, curve.high) for v in part]
    scale, above, below = fit(values, LOSS[1], LOSS[0] + 10, keep=(first,) if bad_step else (first, last))
    xs, lows = _pixels(curve, curve.low.tolist(), axis, scale)
    highs = [scale(float(v)) for v in curve.high]
    raw = [scale(float(v)) for v in curve.y]
    many = sum(not math.isnan(y) for y in raw) > 24
    parts = [*_lane_title("loss", LOSS[0] + 8, by, "log scale" if scale.log else ""), *_grid(scale)]
    parts += [element("path", d=band_data(xs, lows, highs), class_="spread")] if (curve.weight > 1).any() else []
    if many:
        smooth = [scale(float(v)) for v in curve.centred_mean(log=scale.log)]
        parts += [
            element("path", d=path_data(xs, raw), class_="raw"),
            element("path", d=path_data(xs, smooth), class_="mean"),
        ]
    else:
        smooth = raw
        parts += [element("path", d=path_data(xs, raw), class_="mean")]
    if above or below:
        parts.append(_off_scale(curve, xs, above=above))
    hide_first = bad_step is not None and axis(bad_step - 0.5) - xs[0] <= 60
    return [*parts, *_first_and_last(seen.loss, scale, xs, smooth, highs, hide_first=hide_first)]


def _off_scale(curve: Curve, xs: Sequence[float], *, above: bool) -> Markup:
    """Say how far the values reach that the scale leaves out, where the farthest of them is."""
    outer = [v if math.isfinite(v) else 0.0 for v in (curve.high if above else curve.low).tolist()]
    extreme = max(outer) if above else min(outer)
    x = xs[outer.index(extreme)]
    words = f"{'up' if above else 'down'} to {short(extreme)}, off scale"
    before = x - LEFT > 170
    y = LOSS[0] - 3 if above else LOSS[1] + 12
    return text(words, x - 4 if before else x + 8, y, "off halo", anchor="end" if before else None)


def _first_and_last(
    loss: Curve,
    scale: Scale,
    xs: Sequence[float],
    smooth: Sequence[float],
    highs: Sequence[float],
    *,
    hide_first: bool,
) -> list[Markup]:
    """Write the first value beside the start of the curve, on the side it moves away from, and the last at its end."""
    places = [k for k, y in enumerate(smooth) if not math.isnan(y)]
    start, end = places[0], places[-1]
    first = scale(loss.first)
    soon = smooth[next((k for k in places if xs[k] > xs[start] + 30), end)]
    labels: list[Markup] = []
    if not hide_first:
        y = min(first + 17, LOSS[1] + 12) if soon < first else first - 6
        labels.append(text(short(loss.first), xs[start] + 8, y, "value halo"))
    if xs[end] - xs[start] > 90:
        tail = [y for y in highs[max(0, end - len(highs) // 16) : end + 1] if not math.isnan(y)]
        y = min([smooth[end], *tail]) - 7
        y = y if y > LOSS[0] else smooth[end] + 19
        labels.append(text(short(loss.last), min(xs[end], RIGHT), y, "value halo", anchor="end"))
    return labels


def norm_lane(seen: Trace, axis: Scale) -> list[Markup]:
    """Draw the global gradient norm on a logarithmic scale, and the limit that the program clips at."""
    title = _lane_title(
        "gradient norm", NORM[0] + 8, "whole model", "before clipping" if seen.clip_limit is not None else ""
    )
    curve = seen.norm.thinned(POINTS, seen.last_step)
    if not curve.seen:
        words = "zero, NaN or inf in every measured step" if len(seen.norm.x) else "no gradient norm was measured"
        return [*title, line(LEFT, NORM[1], RIGHT, NORM[1], "grid"), text(words, LEFT + 8, NORM[1] - 8)]
    values = sorted(float(v) for v in [*curve.low, *curve.high] if not math.isnan(v))
    low, high = values[0], values[-1]
    limit = seen.clip_limit
    if limit is not None and low / 100 < limit < high * 100:
        low, high = min(low, limit), max(high, limit)
    middle = math.sqrt(low) * math.sqrt(high)
    low, high = min(low, middle / 1.8), max(high, middle * 1.8)
    scale = Scale(low / 1.06, high * 1.06, NORM[1], NORM[0], log=True)
    xs, ys = _pixels(curve, curve.y.tolist(), axis, scale)
    parts = [*title, *_grid(scale)]
    if (curve.weight > 1).any():
        lows, highs = [scale(float(v)) for v in curve.low], [scale(float(v)) for v in curve.high]
        parts.append(element("path", d=band_data(xs, lows, highs), class_="spread n"))
    parts.append(element("path", d=path_data(xs, ys), class_="norm"))
    if limit is not None:
        if scale.lo <= limit <= scale.hi:
            y = scale(limit)
            under = [v for x, v in zip(xs, ys, strict=True) if x > RIGHT - 100 and not math.isnan(v)]
            lies_above = bool(under) and sum(under) / len(under) < y
            place = y + 14 if lies_above and y + 14 < NORM[1] + 14 else y - 5
            parts += [
                line(LEFT, y, RIGHT, y, "clip"),
                text(f"clip at {short(limit)}", RIGHT, place, "on-clip halo", anchor="end"),
            ]
        else:
            side = "above" if limit > scale.hi else "below"
            y = NORM[0] + 4 if limit > scale.hi else NORM[1] - 4
            parts.append(text(f"clip at {short(limit)}, {side} this scale", RIGHT, y, "on-clip halo", anchor="end"))
    return parts


def rate_lane(seen: Trace, axis: Scale) -> list[Markup]:
    """Draw the learning rate, a line a parameter group."""
    title = _lane_title("learning rate", RATE[0] + 8, "and events")
    curves = [curve.thinned(200, seen.last_step) for curve in seen.rates]
    if not curves:
        fixed = [rate for record in seen.optimizers for rate in record.lr[:1] if math.isfinite(rate)]
        words = (
            "no optimizer, no learning rate"
            if seen.by_backward
            else f"{short(fixed[0])} at the start"
            if fixed
            else "not seen"
        )
        return [*title, text(words, LEFT + 8, RATE[1] - 8)]
    top = max(float(c.high[~(c.high != c.high)].max()) for c in curves)
    low = min(0.0, *(float(c.low[~(c.low != c.low)].min()) for c in curves))
    scale = Scale(low, top if top > low else low + 1.0, RATE[1], RATE[0])
    parts = [*title, line(LEFT, RATE[1], RIGHT, RATE[1], "grid")]
    for k, curve in reversed(list(enumerate(curves[:6]))):
        xs, ys = _pixels(curve, curve.y.tolist(), axis, scale)
        if len(xs) > 1 or seen.last_step > 1:
            xs, ys = [axis(0.5), *xs, axis(seen.last_step + 0.5)], [ys[0], *ys, ys[-1]]
        parts.append(element("path", d=path_data(xs, ys), class_="lr" if k == 0 else "lr other"))
    main = curves[0]
    under = np.interp(np.linspace(0.82, 1.0, 8) * seen.last_step, main.x, main.y)  # the words are as wide as this
    y = max(RATE[0] - 6, min(scale(float(v)) for v in under) - 6)
    others = f", {len(curves) - 1} more group{'s' if len(curves) > 2 else ''}" if len(curves) > 1 else ""
    peak = f"peak {short(top)}, now " if top > main.last * 1.02 and not others else ""
    parts.append(text(f"{peak}{short(main.last)}{others}", RIGHT, y, "halo", anchor="end"))
    return parts


def event_lane(seen: Trace, events: Sequence[Event], axis: Scale, bad: Bad | None) -> list[Markup]:
    """Draw the marks of events below the learning rate, and how many there were."""
    ids = {record.o for record in seen.optimizers}
    mine = [
        e
        for e in events
        if e.e in EVENT_WORDS and e.n is not None and 1 <= e.n <= seen.last_step and (e.o is None or e.o in ids)
    ]
    parts: list[Markup] = [line(LEFT, EVENTS, RIGHT, EVENTS, "grid")]
    taken: set[tuple[str, int]] = set()
    if bad and bad.lasting:
        note = element("title", f"NaN or inf from step {bad.first} on")
        parts.append(
            element("path", note, d=f"M{axis(bad.first - 0.5):.1f} {EVENTS}H{RIGHT}", class_="mark error lasting")
        )
    for e in mine:
        if bad and bad.lasting and e.e == "nonfinite":
            continue
        place = (EVENT_LEVELS[e.e], round(axis(float(e.n or 0))))
        if place not in taken:
            taken.add(place)
            note = element("title", f"step {e.n}: {EVENT_WORDS[e.e][0]}")
            parts.append(element("path", note, d=f"M{place[1]} {EVENTS - 5:.0f}v10", class_=f"mark {place[0]}"))
    words: list[str] = []
    for kind, (one, several) in EVENT_WORDS.items():
        steps = bad.steps if bad and kind == "nonfinite" else len({e.n for e in mine if e.e == kind})
        if steps:
            words.append(f"{count_text(steps)} {one if steps == 1 else several}")
    calm = "no non-finite value, no skipped update" if len(seen.samples.first) else "no event"
    parts.append(text(" · ".join(words[:4]) or calm, RIGHT, EVENTS + 17, "halo", anchor="end"))
    return parts


def heat_lane(heat: HeatMap, seen: Trace, row_height: float) -> list[Markup]:
    """Draw the heat map in both scalings, its legend and the brackets of blocks."""
    height = row_height * len(heat.rows)
    sub = "norm as the optimizer got it" + (", after clipping" if seen.clip_limit is not None else "")
    parts = [
        text("gradient by layer", 0, HEAT_TOP - 10, "title"),
        text(sub, LEFT, HEAT_TOP - 10, "halo"),
        *_legend(heat),
    ]
    for kind, uri in (("absolute", heat.absolute), ("relative", heat.relative)):
        parts.append(
            element(
                "image",
                href=uri,
                x=LEFT,
                y=HEAT_TOP,
                width=RIGHT - LEFT,
                height=height,
                class_=kind,
                preserveAspectRatio="none",
            )
        )
    parts.append(element("rect", x=LEFT, y=HEAT_TOP, width=RIGHT - LEFT, height=height, fill="none", class_="frame"))
    free_from = -math.inf
    for bracket in heat.brackets:
        top = HEAT_TOP + bracket.first * row_height
        end = top + bracket.rows * row_height
        if bracket.rows > 1 or row_height > 4:
            parts.append(element("path", d=f"M{LEFT - 4:.0f} {top + 1:.1f}h-3V{end - 1:.1f}h3", class_="bracket"))
        middle = (top + end) / 2 + 4
        if middle - 10 >= free_from:
            full = [element("title", bracket.label[:500])] if len(bracket.label) > 22 else []
            parts.append(element("text", *full, shortened(bracket.label, 22), x=LEFT - 12, y=middle, text_anchor="end"))
            free_from = middle
    return parts


def _legend(heat: HeatMap) -> list[Markup]:
    y = HEAT_TOP - 19
    parts: list[Markup] = []
    x = RIGHT
    for kind, colour, width in (
        ("no gradient", "none", 70),
        ("NaN / inf", hex_colour(_heat.NONFINITE_COLOUR), 56),
        ("zero", hex_colour(_heat.ZERO_COLOUR), 27),
    ):
        if kind == "no gradient" and kind not in heat.kinds:
            continue
        x -= width
        parts.append(text(kind, x, y + 9))
        x -= 15
        parts.append(element("rect", x=x, y=y, width=10, height=10, fill=colour, class_="frame"))
        x -= 16
    for kind, stops, low, high in (
        ("absolute", _heat.ABSOLUTE, tick_text(float(f"{heat.low:.1g}")), tick_text(float(f"{heat.high:.1g}"))),
        ("relative", _heat.RELATIVE, "÷ 10", "× 10"),
    ):
        colours = [
            element("stop", offset=k / 12, stop_color=hex_colour(stops[round(k / 12 * (len(stops) - 1))]))
            for k in range(13)
        ]
        gradient = element("linearGradient", *colours, id=f"ramp-{kind}")
        end = x - 8 * len(high)
        parts.append(
            element(
                "g", gradient,
                text(high, end + 8, y + 9),
                element("rect", x=end - 100, y=y, width=100, height=10, fill=f"url(#ramp-{kind})"),
                text(low, end - 108, y + 9, anchor="end"),
                class_=kind,
            )
        )  # fmt: skip
    return parts


def row_height(rows: int) -> float:
    """Return the height in pixels of one row of a heat map with so many rows."""
    return 18.0 if rows <= 12 else 13.0 if rows <= 28 else max(6.0, 400.0 / rows)


def hex_colour(colour: tuple[int, int, int]) -> str:
    """Write a colour as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
