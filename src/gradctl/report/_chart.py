"""The chart of a run: loss, gradient norm, learning rate and events, and the heat map, on one axis of steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gradctl._journal import Event
from gradctl.report import _heat
from gradctl.report._axes import Scale, count_text, short, step_ticks
from gradctl.report._heat import HeatMap
from gradctl.report._lanes import (
    EVENTS,
    HEAT_TOP,
    LEFT,
    LOSS,
    POINTS,
    RIGHT,
    Bad,
    event_lane,
    heat_lane,
    hex_colour,
    loss_lane,
    norm_lane,
    rate_lane,
    row_height,
)
from gradctl.report._series import Curve, Trace
from gradctl.report._svg import element, line, shortened, text

WIDTH = 1080


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


def draw(seen: Trace, events: Sequence[Event], *, bad: Bad | None, heat: HeatMap | None) -> Chart:
    """Draw the run of one optimizer.

    Args:
        seen: its curves; `last_step` is at least 1.
        events: the journal's events; those of other optimizers are passed over.
        bad: its non-finite values, if it had any.
        heat: the heat map below the curves, if there is one.
    """
    axis = Scale(0.5, seen.last_step + 0.5, LEFT, RIGHT)
    height = row_height(len(heat.rows)) if heat else 0.0
    bottom = HEAT_TOP + height * len(heat.rows) if heat else EVENTS + 8
    parts = [
        element("desc", _description(seen)),
        *loss_lane(seen, axis, bad.first if bad else None),
        *norm_lane(seen, axis),
        *rate_lane(seen, axis),
        *event_lane(seen, events, axis, bad),
        *(heat_lane(heat, seen, height) if heat else ()),
        *_step_axis(seen, axis, bottom),
        *(_bad_line(bad.first, axis, bottom) if bad else ()),
        element("path", d=f"M0 {LOSS[0] - 8:.0f}V{bottom:.0f}", class_="cross", visibility="hidden"),
    ]
    svg = element(
        "svg", *parts, class_="chart", id="run", viewBox=f"0 0 {WIDTH} {math.ceil(bottom + 24)}", role="img",
        tabindex="0", aria_label=f"The run by step: {_description(seen)}",
    )  # fmt: skip
    return Chart(svg, _data(seen, heat, height), heat is not None)


def script_json(value: object) -> Markup:
    """Return JSON that cannot end the `<script>` element that it stands in."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def _description(seen: Trace) -> str:
    steps = f"{seen.last_step} step{'s' if seen.last_step != 1 else ''}"
    loss = f"loss {short(seen.loss.first)} to {short(seen.loss.last)}, " if seen.loss.seen else ""
    norm = f"gradient norm {short(seen.norm.first)} to {short(seen.norm.last)}, " if seen.norm.seen else ""
    return f"{loss}{norm}{steps}"


def _step_axis(seen: Trace, axis: Scale, bottom: float) -> list[Markup]:
    parts = [line(LEFT, bottom + 0.5, RIGHT, bottom + 0.5, "axis"), text("step", 0, bottom + 18)]
    for tick in step_ticks(seen.last_step):
        x = axis(float(tick))
        anchor = "end" if tick == seen.last_step and seen.last_step > 12 else "middle"
        label = text(count_text(tick), min(x, RIGHT), bottom + 18, anchor=anchor)
        parts += [element("path", d=f"M{x:.1f} {bottom + 0.5:.1f}v4", class_="axis"), label]
    return parts


def _bad_line(step: int, axis: Scale, bottom: float) -> list[Markup]:
    x = axis(step - 0.5)
    right = x > RIGHT - 140
    label = text(
        f"step {count_text(step)}: NaN or inf",
        x - 6 if right else x + 6,
        LOSS[0] + 14,
        "on-bad halo",
        anchor="end" if right else None,
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
        "curves": [
            ["loss", values(seen.loss)],
            ["gradient norm", values(seen.norm)],
            ["learning rate", values(seen.rates[0]) if seen.rates else []],
        ],
    }
    if heat:
        drawn["heat"] = {
            "top": HEAT_TOP,
            "row": row_height,
            "names": [shortened(label, 60) for label in heat.rows],
            "low": round(math.log10(heat.low), 4),
            "high": round(math.log10(heat.high), 4),
            "first": _heat.FIRST_LEVEL,
            "absolute": "".join(hex_colour(colour)[1:] for colour in _heat.palette(_heat.ABSOLUTE)),
            "relative": "".join(hex_colour(colour)[1:] for colour in _heat.palette(_heat.RELATIVE)),
        }
    return script_json(drawn)
