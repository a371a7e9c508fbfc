"""The chart of a run: loss, gradient norm, learning rate and events, and the heat map, on one axis of steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gradctl._journal import Event
from gradctl.report import _heat
from gradctl.report._axes import Scale, count_text, fit, short, step_ticks, tick_text
from gradctl.report._heat import HeatMap
from gradctl.report._series import Curve, Trace
from gradctl.report._svg import band_data, element, group, line, path_data, text

WIDTH = 1080
LEFT, RIGHT = 172.0, 1062.0
POINTS = 420
LOSS = (16.0, 122.0)
NORM = (150.0, 222.0)
RATE = (252.0, 282.0)
EVENTS = 300.0
HEAT_TOP = 348.0
EVENT_LEVELS = {
    "nonfinite": "error", "error": "error", "skip": "warning", "stall": "warning", "torn_step": "warning",
    "fault": "note", "tier_off": "note", "off": "note", "accumulation": "note", "child": "note",
}  # fmt: skip
EVENT_WORDS = {
    "nonfinite": ("step with NaN or inf", "steps with NaN or inf"), "skip": ("skipped update", "skipped updates"),
    "stall": ("stalled update", "stalled updates"), "torn_step": ("torn step", "torn steps"),
    "error": ("exception", "exceptions"), "off": ("switch of gradients", "switches of gradients"),
    "accumulation": ("change of accumulation", "changes of accumulation"), "child": ("child process", "child processes"),
    "fault": ("fault of gradctl", "faults of gradctl"), "tier_off": ("tier switched off", "tiers switched off"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn run.

    Attributes:
        svg: the picture.
        data: JSON for the tooltip; safe inside a `<script>` element.
        has_map: whether there is a heat map to switch between scalings.
    """

    svg: Markup
    data: Markup
    has_map: bool


def draw(seen: Trace, events: Sequence[Event], *, bad_step: int | None, heat: HeatMap | None) -> Chart:
    """Draw the run of one optimizer.

    Args:
        seen: its curves; `last_step` is at least 1.
        events: the journal's events; those of other optimizers are passed over.
        bad_step: step of the first non-finite value, drawn as one line through everything.
        heat: the heat map below the curves, if there is one.
    """
    axis = Scale(0.5, seen.last_step + 0.5, LEFT, RIGHT)
    row_height = _row_height(len(heat.rows)) if heat else 0.0
    bottom = HEAT_TOP + row_height * len(heat.rows) if heat else EVENTS + 8
    parts = [
        element("title", "The run by step"),
        element("desc", _description(seen)),
        *_loss_lane(seen, axis, bad_step),
        *_norm_lane(seen, axis),
        *_rate_lane(seen, axis),
        *_event_lane(seen, events, axis),
        *(_heat_lane(heat, seen, row_height) if heat else ()),
        *_step_axis(seen, axis, bottom),
        *(_bad_line(bad_step, seen.last_step, axis, bottom) if bad_step else ()),
        element("path", d=f"M0 {LOSS[0] - 8:.0f}V{bottom:.0f}", class_="cross", visibility="hidden"),
    ]
    svg = element(
        "svg", *parts, class_="chart", id="run", viewBox=f"0 0 {WIDTH} {math.ceil(bottom + 24)}", role="img",
        tabindex="0", aria_label=f"The run by step: {_description(seen)}",
    )  # fmt: skip
    return Chart(svg, _data(seen, heat, row_height), heat is not None)


def script_json(value: object) -> Markup:
    """Return JSON that cannot end the `<script>` element that it stands in."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)  # noqa: S704  the characters that markup is made of are escaped above


def shortened(name: str, most: int) -> str:
    """Cut the middle out of a name that is longer than `most` characters."""
    if len(name) <= most:
        return name
    head = (most - 1) // 3
    return f"{name[:head]}…{name[len(name) - (most - 1 - head):]}"


def _description(seen: Trace) -> str:
    steps = f"{seen.last_step} step{'s' if seen.last_step != 1 else ''}"
    loss = f"loss {short(seen.loss.first)} to {short(seen.loss.last)}, " if seen.loss.seen else ""
    norm = f"gradient norm {short(seen.norm.first)} to {short(seen.norm.last)}, " if seen.norm.seen else ""
    return f"{loss}{norm}{steps}"


def _lane_title(title: str, sub: str, y: float) -> list[Markup]:
    return [text(title, 0, y, "title"), text(sub, 0, y + 16)]


def _grid(scale: Scale, least_gap: float = 14) -> list[Markup]:
    parts: list[Markup] = []
    for tick in scale.ticks():
        y = scale(tick)
        if min(scale.start, scale.end) - 1 <= y <= max(scale.start, scale.end) + 1:
            parts += [line(LEFT, y, RIGHT, y, "grid"), text(tick_text(tick), LEFT - 10, y + 4, anchor="end")]
    return parts


def _pixels(curve: Curve, values: Sequence[float], axis: Scale, scale: Scale) -> tuple[list[float], list[float]]:
    return [axis(float(x)) for x in curve.x], [scale(float(v)) for v in values]


def _loss_lane(seen: Trace, axis: Scale, bad_step: int | None) -> list[Markup]:
    by = "each backward is a step" if seen.by_backward else "as passed to backward"
    curve = seen.loss.thinned(POINTS, seen.last_step)
    if not curve.seen:
        return [
            *_lane_title("loss", by, LOSS[0] + 8),
            line(LEFT, LOSS[1], RIGHT, LOSS[1], "grid"),
            text("no finite loss was passed to backward" if seen.blocks else "no loss was seen", LEFT + 8, LOSS[1] - 8),
        ]
    first, last = seen.loss.first, seen.loss.last
    values = [float(v) for part in (curve.low, curve.high) for v in part]
    scale, above, below = fit(values, LOSS[1], LOSS[0], keep=(first,) if bad_step else (first, last))
    xs, lows = _pixels(curve, curve.low.tolist(), axis, scale)
    highs = [scale(float(v)) for v in curve.high]
    raw = [scale(float(v)) for v in curve.y]
    many = len(curve.y) > 24
    parts = [*_lane_title("loss", f"{by}, log" if scale.log else by, LOSS[0] + 8), *_grid(scale)]
    parts += [element("path", d=band_data(xs, lows, highs), class_="spread")] if (curve.weight > 1).any() else []
    if many:
        smooth = [scale(float(v)) for v in curve.centred_mean()]
        parts += [element("path", d=path_data(xs, raw), class_="raw"), element("path", d=path_data(xs, smooth), class_="mean")]
    else:
        smooth = raw
        parts += [element("path", d=path_data(xs, raw), class_="mean")]
    places = [k for k, y in enumerate(smooth) if not math.isnan(y)]
    start, end = places[0], places[-1]
    if above or below:
        extreme = max(values, key=lambda v: -math.inf if math.isnan(v) else v) if above else min(
            values, key=lambda v: math.inf if math.isnan(v) else v
        )
        outer = curve.high.tolist() if above else curve.low.tolist()
        x = xs[outer.index(extreme)]
        right = x > (LEFT + RIGHT) / 2
        words = f"{'up' if above else 'down'} to {short(extreme)}, off scale"
        y = LOSS[0] - 3 if above else LOSS[1] + 12
        parts.append(text(words, x - 4 if right or x - LEFT > 170 else x + 8, y, "off halo", anchor="end" if right or x - LEFT > 170 else None))
    if seen.last_step == 1:
        return [*parts, text(short(first), xs[start] + 8, smooth[start] - 8, "value halo")]
    falls = raw[min(len(raw) - 1, start + 2)] >= raw[start] or math.isnan(raw[min(len(raw) - 1, start + 2)])
    y = raw[start] - 6 if raw[start] - 6 > LOSS[0] + 6 else raw[start] + 4
    y = y if falls else min(raw[start] + 17, LOSS[1] + 12)
    parts.append(text(short(first), xs[start] + 8, y, "value halo"))
    if end > start and xs[end] - xs[start] > 90:
        y = smooth[end] - 8 if smooth[end] - 8 > LOSS[0] + 4 else smooth[end] + 19
        highest = min((y for y in highs[max(0, end - len(highs) // 16) : end + 1] if not math.isnan(y)), default=y)
        y = highest - 6 if LOSS[0] + 6 < highest - 6 < y else y
        parts.append(text(short(last), min(xs[end], RIGHT), y, "value halo", anchor="end"))
    return parts


def _norm_lane(seen: Trace, axis: Scale) -> list[Markup]:
    sub = "whole model, before clip" if seen.clip_limit is not None else "whole model"
    title = _lane_title("gradient norm", sub, NORM[0] + 8)
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
            parts += [line(LEFT, y, RIGHT, y, "clip"), text(f"clip at {short(limit)}", RIGHT, place, "on-clip halo", anchor="end")]
        else:
            side = "above" if limit > scale.hi else "below"
            y = NORM[0] + 4 if limit > scale.hi else NORM[1] - 4
            parts.append(text(f"clip at {short(limit)}, {side} this scale", RIGHT, y, "on-clip halo", anchor="end"))
    return parts


def _rate_lane(seen: Trace, axis: Scale) -> list[Markup]:
    title = _lane_title("learning rate", "and events", RATE[0] + 8)
    curves = [curve.thinned(200, seen.last_step) for curve in seen.rates]
    if not curves:
        fixed = [rate for record in seen.optimizers for rate in record.lr[:1] if math.isfinite(rate)]
        words = "no optimizer, no learning rate" if seen.by_backward else f"{short(fixed[0])} at the start" if fixed else "not seen"
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
    y = scale(main.last) - 5
    others = f", {len(curves) - 1} more group{'s' if len(curves) > 2 else ''}" if len(curves) > 1 else ""
    peak = f"peak {short(top)}, now " if top > main.last * 1.02 and not others else ""
    parts.append(text(f"{peak}{short(main.last)}{others}", RIGHT, y if y > RATE[0] - 8 else RATE[0] - 5, "halo", anchor="end"))
    return parts


def _event_lane(seen: Trace, events: Sequence[Event], axis: Scale) -> list[Markup]:
    ids = {record.o for record in seen.optimizers}
    mine = [e for e in events if e.e in EVENT_WORDS and e.n is not None and 1 <= e.n <= seen.last_step and (e.o is None or e.o in ids)]
    parts: list[Markup] = [line(LEFT, EVENTS, RIGHT, EVENTS, "grid")]
    taken: set[tuple[str, int]] = set()
    for e in mine:
        place = (EVENT_LEVELS[e.e], round(axis(float(e.n or 0))))
        if place not in taken:
            taken.add(place)
            note = element("title", f"step {e.n}: {EVENT_WORDS[e.e][0]}")
            parts.append(element("path", note, d=f"M{place[1]} {EVENTS - 5:.0f}v10", class_=f"mark {place[0]}"))
    words: list[str] = []
    for kind, (one, several) in EVENT_WORDS.items():
        steps = len({e.n for e in mine if e.e == kind})
        if steps:
            words.append(f"{count_text(steps)} {one if steps == 1 else several}")
    calm = "no non-finite value, no skipped update" if len(seen.samples.first) else "no event"
    parts.append(text(" · ".join(words[:4]) or calm, RIGHT, EVENTS + 17, "halo", anchor="end"))
    return parts


def _heat_lane(heat: HeatMap, seen: Trace, row_height: float) -> list[Markup]:
    height = row_height * len(heat.rows)
    sub = "norm as the optimizer got it" + (", after clipping" if seen.clip_limit is not None else "")
    parts = [text("gradient by layer", 0, HEAT_TOP - 10, "title"), text(sub, LEFT, HEAT_TOP - 10), *_legend(heat)]
    for kind, uri in (("absolute", heat.absolute), ("relative", heat.relative)):
        parts.append(
            element(
                "image", href=uri, x=LEFT, y=HEAT_TOP, width=RIGHT - LEFT, height=height, class_=kind, preserveAspectRatio="none"
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
            parts.append(
                element("text", *full, shortened(bracket.label, 22), x=LEFT - 12, y=middle, text_anchor="end")
            )
            free_from = middle
    return parts


def _legend(heat: HeatMap) -> list[Markup]:
    y = HEAT_TOP - 19
    parts: list[Markup] = []
    x = RIGHT
    for kind, colour in (("no gradient", "none"), ("NaN / inf", _hex(_heat.NONFINITE_COLOUR)), ("zero", _hex(_heat.ZERO_COLOUR))):
        if kind == "no gradient" and kind not in heat.kinds:
            continue
        parts.append(text(kind, x, y + 9, anchor="end"))
        x -= 7 * len(kind) + 14
        parts.append(element("rect", x=x, y=y, width=10, height=10, fill=colour, class_="frame"))
        x -= 16
    for kind, stops, low, high in (
        ("absolute", _heat.ABSOLUTE, short(heat.low), short(heat.high)),
        ("relative", _heat.RELATIVE, "÷ 10", "× 10"),
    ):
        colours = [
            element("stop", offset=k / 12, stop_color=_hex(stops[round(k / 12 * (len(stops) - 1))])) for k in range(13)
        ]
        gradient = element("linearGradient", *colours, id=f"ramp-{kind}")
        end = x - 8 * len(high)
        parts.append(
            element(
                "g", gradient,
                text(high, end + 108 - 100, y + 9),
                element("rect", x=end - 100 + 0, y=y, width=100, height=10, fill=f"url(#ramp-{kind})"),
                text(low, end - 108, y + 9, anchor="end"),
                class_=kind,
            )
        )  # fmt: skip
    return parts


def _step_axis(seen: Trace, axis: Scale, bottom: float) -> list[Markup]:
    parts = [line(LEFT, bottom + 0.5, RIGHT, bottom + 0.5, "axis"), text("step", 0, bottom + 18)]
    for tick in step_ticks(seen.last_step):
        x = axis(float(tick))
        anchor = "end" if tick == seen.last_step and seen.last_step > 12 else "middle"
        label = text(count_text(tick), min(x, RIGHT), bottom + 18, anchor=anchor)
        parts += [element("path", d=f"M{x:.1f} {bottom + 0.5:.1f}v4", class_="axis"), label]
    return parts


def _bad_line(step: int, last_step: int, axis: Scale, bottom: float) -> list[Markup]:
    x = axis(step - 0.5)
    right = step > last_step * 0.8
    label = text(
        f"step {count_text(step)}: NaN or inf", x - 6 if right else x + 6, LOSS[0] + 14, "on-bad halo", anchor="end" if right else None
    )
    return [element("path", d=f"M{x:.1f} {LOSS[0] - 8:.0f}V{bottom:.1f}", class_="bad"), label]


def _data(seen: Trace, heat: HeatMap | None, row_height: float) -> Markup:
    def values(curve: Curve) -> list[list[float]]:
        thin = curve.thinned(POINTS, seen.last_step)
        return [[float(f"{x:.7g}"), float(f"{y:.3g}")] for x, y in zip(thin.x, thin.y, strict=True) if math.isfinite(y)]

    drawn: dict[str, object] = {
        "last": seen.last_step,
        "left": LEFT,
        "right": RIGHT,
        "curves": [["loss", values(seen.loss)], ["gradient norm", values(seen.norm)], ["learning rate", values(seen.rates[0]) if seen.rates else []]],
    }
    if heat:
        drawn["heat"] = {
            "top": HEAT_TOP,
            "row": row_height,
            "names": [shortened(label, 60) for label in heat.rows],
            "low": round(math.log10(heat.low), 4),
            "high": round(math.log10(heat.high), 4),
            "first": _heat.FIRST_LEVEL,
            "absolute": "".join(_hex(colour)[1:] for colour in _heat.palette(_heat.ABSOLUTE)),
            "relative": "".join(_hex(colour)[1:] for colour in _heat.palette(_heat.RELATIVE)),
        }
    return script_json(drawn)


def _row_height(rows: int) -> float:
    return 18.0 if rows <= 12 else 13.0 if rows <= 28 else max(6.0, 400.0 / rows)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
