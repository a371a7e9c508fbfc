"""The heat map of layers by steps: which tensors make a row, what a cell is worth, which colour it gets.

Cells are the largest gradient norm in their stretch of steps. A stretch without a measurement repeats the one before
it, NaN included: a dead run that is rarely measured must not look half healthy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from gradctl.report._png import Colour, data_uri, ramp
from gradctl.report._series import NO_GRADIENT, Samples

COLUMNS = 240
MOST_ROWS = 72
LEVELS = 60
NONE, ZERO, NONFINITE, FIRST_LEVEL = 0, 1, 2, 3
ZERO_COLOUR: Colour = (122, 124, 130)
NONFINITE_COLOUR: Colour = (222, 48, 48)
ABSOLUTE = ramp([(20, 28, 76), (40, 84, 148), (36, 128, 142), (84, 178, 126), (206, 214, 92), (252, 246, 206)], LEVELS)
RELATIVE = ramp(
    [(24, 64, 150), (92, 146, 210), (190, 212, 232), (244, 243, 238), (246, 200, 158), (226, 118, 58), (150, 42, 14)],
    LEVELS,
)


@dataclass(frozen=True, slots=True)
class Bracket:
    """A block of neighbouring rows, such as `h.0`.

    Attributes:
        label: its name without what all names share.
        first: its first row, from 0 at the top.
        rows: how many rows it spans.
    """

    label: str
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Two pictures of the same cells, ready to be placed.

    Attributes:
        absolute: data URI, colour by the norm itself.
        relative: data URI, colour by the norm over the row's own median.
        rows: label of each row, from the top.
        columns: cells in a row.
        brackets: blocks of rows, from the top.
        low: norm of the darkest colour of `absolute`.
        high: norm of the lightest colour of `absolute`.
        kinds: which of "zero", "NaN / inf" and "no gradient" appear.
    """

    absolute: str
    relative: str
    rows: tuple[str, ...]
    columns: int
    brackets: tuple[Bracket, ...]
    low: float
    high: float
    kinds: frozenset[str]


def build(names: Sequence[str | None], samples: Samples, last_step: int) -> HeatMap | None:
    """Return the heat map of a run, or None when no gradient was measured.

    Args:
        names: name of each tensor, in model order.
        samples: gradient norms, one column of `values` a tensor.
        last_step: the step at the right edge; 1 or more.
    """
    if not len(samples.first) or not names or last_step < 1:
        return None
    groups = rows_of(names)
    rows = _combine(samples.values, [members for _, members in groups])
    cells = samples.paint(min(COLUMNS, last_step), last_step, rows)
    levels = np.full(cells.shape, np.nan)
    positive = np.isfinite(cells) & (cells > 0)
    np.log10(cells, out=levels, where=positive)
    low, high = _range(levels[positive])
    absolute = _index(cells, (levels - low) / (high - low))
    medians = np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else 0.0 for row in levels])
    relative = _index(cells, (levels - medians[:, None] + 1) / 2)
    kinds = {
        kind
        for kind, there in (
            ("zero", cells == 0), ("NaN / inf", np.isnan(cells)), ("no gradient", cells == NO_GRADIENT)
        )
        if there.any()
    }  # fmt: skip
    labels = tuple(label for label, _ in groups)
    return HeatMap(
        absolute=data_uri([row.tobytes() for row in absolute], palette(ABSOLUTE)),
        relative=data_uri([row.tobytes() for row in relative], palette(RELATIVE)),
        rows=labels,
        columns=cells.shape[1],
        brackets=brackets_of(labels),
        low=10.0**low,
        high=10.0**high,
        kinds=frozenset(kinds),
    )


def palette(levels: Sequence[Colour]) -> list[Colour]:
    """Return the picture's palette: none (transparent), zero, NaN, then the levels."""
    return [(255, 255, 255), ZERO_COLOUR, NONFINITE_COLOUR, *levels]


def rows_of(names: Sequence[str | None]) -> list[tuple[str, list[int]]]:
    """Combine tensors into at most `MOST_ROWS` rows: by module first, then by ever larger blocks.

    Weights and biases of one module differ by factors of 10 to 100; as rows of their own they would make stripes.

    Returns:
        Label and indexes of the tensors of each row, in model order.
    """
    paths = [tuple(name.split(".")) if name else (f"tensor {index}", "") for index, name in enumerate(names)]
    deepest = max(len(path) for path in paths)
    finer = groups = _by_prefix([path[:-1] or path for path in paths])
    for depth in range(min(deepest, 12) - 1, 0, -1):
        if len(groups) <= MOST_ROWS:
            break
        finer, groups = groups, _by_prefix([path[:-1][:depth] or path for path in paths])
    if len(finer) <= MOST_ROWS:
        return finer
    every = -(-len(finer) // MOST_ROWS)
    while len(merged := _merged(finer, every)) > MOST_ROWS and every < len(finer):
        every *= 2
    if len(merged) > MOST_ROWS:  # every row has a parent of its own: join them regardless of it
        every = -(-len(finer) // MOST_ROWS)
        merged = [_joined(finer[k : k + every]) for k in range(0, len(finer), every)]
    return max((g for g in (groups, merged) if len(g) <= MOST_ROWS), key=len)


def _merged(groups: Sequence[tuple[str, list[int]]], every: int) -> list[tuple[str, list[int]]]:
    """Join up to `every` neighbours that lie in the same block."""
    rows: list[tuple[str, list[int]]] = []
    for _, siblings in groupby(groups, key=lambda group: group[0].rpartition(".")[0]):
        block = list(siblings)
        rows += [_joined(block[k : k + every]) for k in range(0, len(block), every)]
    return rows


def _joined(groups: Sequence[tuple[str, list[int]]]) -> tuple[str, list[int]]:
    first, last = groups[0][0], groups[-1][0]
    tail = last.rpartition(".")[2] if first.rpartition(".")[0] == last.rpartition(".")[0] else last
    label = first if first == last else f"{first} … {tail}"
    return label, [index for _, members in groups for index in members]


def brackets_of(labels: Sequence[str]) -> tuple[Bracket, ...]:
    """Group rows by the first numbered block of their path (`h.0`), or by its first part."""
    paths = [label.split(".") for label in labels]
    shared = 0
    while len(paths) > 1 and all(len(p) > shared + 1 for p in paths) and len({p[shared] for p in paths}) == 1:
        shared += 1
    keys: list[str] = []
    for path in paths:
        rest = path[shared:]
        numbered = next((k for k, part in enumerate(rest[:3]) if part.split(" ")[0].isdigit()), 0)
        keys.append(".".join(rest[: numbered + 1]))
    while (
        shared < 12 and len(keys) > 1 and len(set(keys)) > 1
    ):  # "transformer.h.0" beside "transformer.wte" reads as "h.0"
        heads = {key.split(".")[0] for key in keys if "." in key}
        if len(heads) != 1 or not all("." in key for key in keys):
            break
        keys = [key.split(".", 1)[1] for key in keys]
    brackets: list[Bracket] = []
    row = 0
    for key, members in groupby(keys):
        rows = len(list(members))
        brackets.append(Bracket(key, row, rows))
        row += rows
    return tuple(brackets)


def _by_prefix(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, list[int]]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, path in enumerate(paths):
        groups.setdefault(path, []).append(index)
    return [(".".join(part for part in path if part), members) for path, members in groups.items()]


def _combine(values: NDArray[np.float64], groups: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    combined = np.empty((len(values), len(groups)))
    for row, members in enumerate(groups):
        part = values[:, list(members)]
        seen = part != NO_GRADIENT
        squares = np.where(seen, np.minimum(part, 1e150) ** 2, 0.0)
        combined[:, row] = np.where(seen.any(axis=1), np.sqrt(squares.sum(axis=1)), NO_GRADIENT)
    return combined


def _range(levels: NDArray[np.float64]) -> tuple[float, float]:
    if not levels.size:
        return -3.0, 0.0
    low, high = (float(q) for q in np.quantile(levels, (0.02, 0.98)))
    missing = max(0.0, 3.0 - (high - low))
    return low - missing * 0.5, high + missing * 0.5


def _index(cells: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    levels = np.rint(np.clip(np.nan_to_num(shares), 0, 1) * (LEVELS - 1)) + FIRST_LEVEL
    index = np.where(cells == 0, ZERO, np.where(cells == NO_GRADIENT, NONE, levels))
    return np.where(np.isnan(cells), NONFINITE, index).astype(np.uint8)
