"""Write SVG: elements with escaped attributes and text, and paths with gaps where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

Attribute = str | float | int | None


def element(tag: str, *children: Markup | str, **attributes: Attribute) -> Markup:
    """Return one element; text and attribute values are escaped, `Markup` children are taken as they are.

    Args:
        tag: the element's name.
        children: inner elements (`Markup`) and text (`str`).
        attributes: `class_` is written as `class`, `text_anchor` as `text-anchor`; None leaves the attribute out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(str(escape(child)) for child in children)
    return Markup(f"<{tag}{written}>{inner}</{tag}>" if inner else f"<{tag}{written}/>")


def group(parts: Iterable[Markup]) -> Markup:
    """Join elements that are already markup."""
    return Markup("").join(parts)


def text(words: str, x: float, y: float, class_: str | None = None, *, anchor: str | None = None) -> Markup:
    """Return a text element whose baseline starts (or ends, with `anchor="end"`) at `x`, `y`."""
    return element("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("path", d=f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", class_=class_)


def path_data(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return the `d` of a path through the points; a NaN breaks the line, a lone point becomes a dash."""
    parts: list[str] = []
    drawing = False
    for index, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if math.isnan(x) or math.isnan(y):
            drawing = False
            continue
        if not drawing:
            alone = index + 1 == len(ys) or math.isnan(ys[index + 1])
            parts.append(f"M{number(x - 1)} {number(y)}h2" if alone else f"M{number(x)} {number(y)}")
        else:
            parts.append(f"L{number(x)} {number(y)}")
        drawing = True
    return "".join(parts)


def band_data(xs: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> str:
    """Return the `d` of a filled band between two curves; a NaN in either closes the piece before it."""
    pieces: list[str] = []
    piece: list[tuple[float, float, float]] = []
    for x, low, high in [*zip(xs, lows, highs, strict=True), (math.nan, math.nan, math.nan)]:
        if not (math.isnan(low) or math.isnan(high)):
            piece.append((x, low, high))
            continue
        if len(piece) > 1:
            forth = "L".join(f"{number(a)} {number(h)}" for a, _, h in piece)
            back = "L".join(f"{number(a)} {number(b)}" for a, b, _ in reversed(piece))
            pieces.append(f"M{forth}L{back}Z")
        piece = []
    return "".join(pieces)


def spark_data(values: Sequence[float], width: int, height: int) -> str:
    """Return the `d` of a small line on its own scale, in whole pixels and relative moves to stay short."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    spread = (high - low) or 1.0
    last_x, last_y, written = 0, 0, ""
    drawing = False
    for index, value in enumerate(values):
        if not math.isfinite(value):
            drawing = False
            continue
        x = round(index / (len(values) - 1) * width)
        y = round(height - (value - low) / spread * height) if high > low else height // 2
        moved = f"{x - last_x} {y - last_y}".replace(" -", "-")
        written += f"{'l' if drawing else 'm'}{moved}"
        last_x, last_y, drawing = x, y, True
    return written


def shortened(name: str, most: int) -> str:
    """Cut the middle out of a name that is longer than `most` characters."""
    if len(name) <= most:
        return name
    head = (most - 1) // 3
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def number(value: float) -> str:
    """Write a coordinate with one decimal, without a trailing zero."""
    rounded = f"{value:.1f}"
    return rounded[:-2] if rounded.endswith(".0") else rounded


def _value(value: str | float | int) -> str:
    return value if isinstance(value, str) else number(value)
