"""The table of layers: a row a tensor, with its norm by step and how far an update moves it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from gradctl.report._axes import count_text, short
from gradctl.report._series import NO_GRADIENT, Trace
from gradctl.report._svg import spark_data

MOST_ROWS = 1000
MOST_SPARKS = 200
SPARK_WIDTH, SPARK_HEIGHT = 90, 18
STRIP = (-6.0, 0.0)
"""Decades that the strip of update / weight shows."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One row.

    Attributes:
        name: what the model calls the tensor, or its number.
        shape: `768 × 3072`, `scalar`, or empty where unknown.
        numel: number of elements, for sorting; 0 where unknown.
        norm: median gradient norm as text.
        norm_value: the same for sorting, or None.
        flag: "NaN", "zero" or "none" when that is all there is to say of the last value; else empty.
        spark: path of the norm by step on its own logarithmic scale; empty when there are too many rows.
        update: median update over weight as text; empty where none was measured.
        update_value: the same for sorting, or None.
        place: position of the mark on the strip, 0 to 100.
        vector: True for tensors of fewer than two dims, whose updates say little.
    """

    name: str
    shape: str
    numel: int
    norm: str
    norm_value: float | None
    flag: str
    spark: Markup
    update: str
    update_value: float | None
    place: float
    vector: bool


@dataclass(frozen=True, slots=True)
class LayerTable:
    """The rows that are shown and how many are not.

    Attributes:
        rows: in model order.
        left_out: tensors beyond `MOST_ROWS`.
        sparks: whether rows have a small curve.
        sparks_left_out: rows that would have one and do not.
        any_update: whether any update ratio was measured.
    """

    rows: tuple[Layer, ...]
    left_out: int
    sparks: bool
    sparks_left_out: int
    any_update: bool


def table(seen: Trace) -> LayerTable | None:
    """Return the table of an optimizer's tensors, or None when it has none.

    Beyond `MOST_ROWS` tensors those with NaN, zero or no gradient come first into the choice, then model order.
    """
    count = len(seen.names)
    if not count:
        return None
    source = seen.singles if len(seen.singles.first) else seen.samples
    values = np.where(np.isfinite(source.values) & (source.values > 0), source.values, np.nan)
    medians = _medians(values, count)
    updates = _medians(np.where(np.isfinite(seen.updates) & (seen.updates > 0), seen.updates, np.nan), count)
    last = seen.samples.values[-1] if len(seen.samples.first) else np.full(count, np.nan)
    flags = [_flag(float(v)) if len(seen.samples.first) else "" for v in last]
    chosen = list(range(count))
    if count > MOST_ROWS:
        odd = [k for k in chosen if flags[k]][:MOST_ROWS]
        rest = [k for k in chosen if not flags[k]][: MOST_ROWS - len(odd)]
        chosen = sorted([*odd, *rest])
    with_spark = chosen[:MOST_SPARKS] if len(seen.samples.first) > 1 else []
    curves = dict(zip(with_spark, _curves(seen, with_spark, 36 if len(with_spark) <= 80 else 24), strict=True))
    rows: list[Layer] = []
    for k in chosen:
        shape = seen.shapes[k]
        ratio = float(updates[k])
        rows.append(
            Layer(
                name=seen.names[k] or f"tensor {k}",
                shape=" × ".join(str(d) for d in shape) or "scalar" if shape is not None else "",
                numel=math.prod(shape) if shape is not None else 0,
                norm=short(float(medians[k])) if math.isfinite(medians[k]) else "",
                norm_value=float(f"{medians[k]:.4g}") if math.isfinite(medians[k]) else None,
                flag=flags[k],
                spark=Markup(spark_data(curves[k], SPARK_WIDTH, SPARK_HEIGHT)) if k in curves else Markup(),
                update=short(ratio) if math.isfinite(ratio) else "",
                update_value=float(f"{ratio:.4g}") if math.isfinite(ratio) else None,
                place=_place(ratio),
                vector=shape is not None and sum(d > 1 for d in shape) < 2,
            )
        )
    return LayerTable(
        rows=tuple(rows),
        left_out=count - len(chosen),
        sparks=bool(with_spark),
        sparks_left_out=len(chosen) - len(with_spark) if with_spark else 0,
        any_update=any(row.update for row in rows),
    )


def left_out_note(table: LayerTable) -> str:
    """Say what the table leaves out, or nothing."""
    notes: list[str] = []
    if table.sparks_left_out:
        notes.append(f"Curves for the first {count_text(MOST_SPARKS)}.")
    if table.left_out:
        notes.append(f"{count_text(table.left_out)} more tensors are in the journal.")
    return " ".join(notes)


def _medians(values: np.ndarray, count: int) -> np.ndarray:
    found = np.full(count, np.nan)
    if len(values):
        known = np.isfinite(values).any(axis=0)
        if known.any():
            found[known] = np.nanmedian(values[:, known], axis=0)
    return found


def _curves(seen: Trace, tensors: list[int], points: int) -> list[list[float]]:
    if not tensors:
        return []
    cells = seen.samples.paint(min(points, max(2, seen.last_step)), seen.last_step, seen.samples.values[:, tensors])
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.where(cells > 0, np.log10(cells), np.nan)
    return [[float(v) for v in row] for row in levels]


def _flag(value: float) -> str:
    return "NaN" if math.isnan(value) else "zero" if value == 0 else "none" if value == NO_GRADIENT else ""


def _place(ratio: float) -> float:
    if not math.isfinite(ratio) or ratio <= 0:
        return 0.0
    low, high = STRIP
    return round(min(1.0, max(0.0, (math.log10(ratio) - low) / (high - low))) * 100, 1)
