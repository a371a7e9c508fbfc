"""Choose, for each segment of a step, what to keep: integer programs over the operations, then one over the segments.

The first answers, for one segment and a number of bytes: which contents stay, so that what is called again takes the
least time. Solved for a row of budgets it gives the segment's frontier; segments that are alike share it. The second
picks one point of each frontier, so that the bytes stay below the budget at every moment of the step. Both are exact
with SciPy's HiGHS; without SciPy a greedy search takes their place.

Source: Herrmann et al. 2019 (arXiv:1911.13214) for chains, Jain et al. 2020 (arXiv:1910.02653) for graphs. Differs:
cost is measured, and memory is the peak of the whole step, which a ledger of the step gives for every moment.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gradctl._fit._layout import Layout, Option, Segment, replay_bytes
from gradctl._recompute import Codec

_POINTS = 12
_ROUNDS = 30
_PACK_BYTES_PER_SECOND = 1.5e9


def has_solver() -> bool:
    """Whether SciPy, and with it HiGHS, is installed."""
    return importlib.util.find_spec("scipy") is not None


@dataclass(frozen=True)
class Costs:
    """What the machinery itself takes, in seconds.

    Args:
        note: to note one operation.
        again: to call one operation again, beside the operation itself.
    """

    note: float = 12e-6
    again: float = 12e-6


def packable(segment: Segment) -> dict[int, tuple[Codec, int]]:
    """Return the saved contents that can be packed exactly, how, and to how many bytes: masks and pooling indices."""
    names: dict[int, list[str]] = {}
    for step in segment.steps:
        for key in step.makes:
            names[key] = [step.name]
        for before, made in step.writes:
            names[made] = [*names.get(before, []), step.name]
    found: dict[int, tuple[Codec, int]] = {}
    for key in segment.saved:
        content, made_by = segment.contents[key], names.get(key, [])
        if made_by[:2] == ["aten.empty_like", "aten.bernoulli_"] and made_by[2:] in ([], ["aten.div_"]):
            found[key] = "bits", -(-content.nbytes // (8 * content.dtype.itemsize))
        elif content.dtype.itemsize == 1 and str(content.dtype) == "torch.bool":
            found[key] = "bits", -(-content.nbytes // 8)
        elif str(content.dtype) == "torch.int64" and made_by == ["aten.max_pool2d_with_indices"]:
            found[key] = "int16", content.nbytes // 4
    return found


class Program:
    """The integer program of one segment.

    Args:
        segment: its operations and what they make.
        costs: of the machinery.
        pack: whether contents may be packed.
    """

    def __init__(self, segment: Segment, costs: Costs, *, pack: bool) -> None:
        self.segment = segment
        self.steps = segment.steps
        self.row_of = {step.index: i for i, step in enumerate(self.steps)}
        self.maker = {key: i for i, step in enumerate(self.steps) for key in _made(step)}
        self.keepable = [key for key, content in segment.contents.items() if content.final and key in self.maker]
        self.packs = packable(segment) if pack else {}
        self.seconds = np.array([step.seconds + costs.note + costs.again for step in self.steps])
        # One storage is kept once, however many of its contents were saved.
        self.nbytes = np.array([segment.contents[key].nbytes for key in self.keepable], dtype=float)

    def option(self, keep: frozenset[int], packed: frozenset[int]) -> Option:
        """Return what follows from keeping these contents."""
        segment = self.segment
        targets = frozenset(key for key in segment.saved if key not in keep and key not in packed)
        run = self.needed(targets, keep | packed)
        read = {key for i in run for key in self.steps[i].reads}
        keep = frozenset(key for key in keep if segment.contents[key].saved or key in read)
        positions = tuple(sorted(self.steps[i].index for i in run))
        pack = {key: self.packs[key] for key in packed}
        kept = sum(segment.contents[key].nbytes for key in keep) + sum(nbytes for _, nbytes in pack.values())
        seconds = float(sum(self.seconds[i] for i in run))
        seconds += sum(segment.contents[key].nbytes for key in packed) / _PACK_BYTES_PER_SECOND
        return Option(keep, pack, positions, kept, replay_bytes(segment, positions, targets), seconds)

    def needed(self, targets: frozenset[int], at_hand: frozenset[int]) -> set[int]:
        """Return the rows of the operations that must be called again to make `targets`."""
        found: set[int] = set()
        queue = [key for key in targets if key in self.maker]
        while queue:
            row = self.maker[queue.pop()]
            if row in found:
                continue
            found.add(row)
            queue += [key for key in self.steps[row].reads if key in self.maker and key not in at_hand]
        return found

    def frontier(self) -> list[Option]:
        """Return options from keeping nothing to keeping everything, none better than another in both."""
        everything = frozenset(key for key in self.keepable if self.segment.contents[key].saved)
        found = [self.option(frozenset(), frozenset()), self.option(everything, frozenset())]
        if self.packs:
            found.append(self.option(everything - self.packs.keys(), frozenset(self.packs)))
        most = found[1].kept_bytes
        solve = self._exact if has_solver() else self._greedy
        for share in np.linspace(0, 1, _POINTS)[1:-1]:
            kept, packed = solve(most * float(share))
            found.append(self.option(kept, packed))
        found.sort(key=lambda o: (o.kept_bytes, o.seconds))
        best: list[Option] = []
        for option in found:
            if not best or option.seconds < best[-1].seconds - 1e-9 or option.replay_bytes < best[-1].replay_bytes:
                best.append(option)
        return best

    def _exact(self, budget: float) -> tuple[frozenset[int], frozenset[int]]:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import lil_matrix

        rows, keeps, packs = len(self.steps), len(self.keepable), list(self.packs)
        keep_at = {key: rows + i for i, key in enumerate(self.keepable)}
        pack_at = {key: rows + keeps + i for i, key in enumerate(packs)}
        at_hand = {key: [at[key] for at in (keep_at, pack_at) if key in at] for key in self.maker}
        wanted: list[tuple[list[int], int | None]] = [
            ([self.maker[key], *at_hand[key]], None) for key in self.segment.saved if key in self.maker
        ]
        for i, step in enumerate(self.steps):
            wanted += [([self.maker[key], *at_hand[key]], i) for key in step.reads if key in self.maker]
        matrix: Any = lil_matrix((len(wanted) + 1 + len(packs), rows + keeps + len(packs)))
        low: Any = np.zeros(len(wanted) + 1 + len(packs))
        high: Any = np.full(len(low), np.inf)
        for i, (any_of, user) in enumerate(wanted):
            for column in any_of:
                matrix[i, column] = 1
            if user is None:
                low[i] = 1
            else:
                matrix[i, user] -= 1
        for key, column in keep_at.items():
            matrix[len(wanted), column] = self.segment.contents[key].nbytes / 2**20
        for i, key in enumerate(packs):
            matrix[len(wanted), pack_at[key]] = self.packs[key][1] / 2**20
            if key in keep_at:
                matrix[len(wanted) + 1 + i, keep_at[key]] = 1
                matrix[len(wanted) + 1 + i, pack_at[key]] = 1
                high[len(wanted) + 1 + i] = 1
        high[len(wanted)] = budget / 2**20
        pack_seconds = [self.segment.contents[key].nbytes / _PACK_BYTES_PER_SECOND for key in packs]
        cost = np.concatenate([self.seconds, np.full(keeps, 1e-9), pack_seconds])
        solved = milp(
            cost,
            constraints=LinearConstraint(matrix.tocsr(), low, high),
            bounds=Bounds(0, 1),
            integrality=np.ones(len(cost)),
            options={"time_limit": 2.0, "mip_rel_gap": 1e-3},
        )
        if solved.x is None:
            return frozenset(), frozenset()
        on = solved.x > 0.5
        return (
            frozenset(key for key, column in keep_at.items() if on[column]),
            frozenset(key for key, column in pack_at.items() if on[column]),
        )

    def _greedy(self, budget: float) -> tuple[frozenset[int], frozenset[int]]:
        kept: frozenset[int] = frozenset()
        left = budget
        now = self.option(kept, frozenset()).seconds
        candidates = set(self.keepable)
        while candidates:
            best, gain, best_seconds = None, 0.0, now
            for key in candidates:
                nbytes = self.segment.contents[key].nbytes
                if nbytes > left:
                    continue
                seconds = self.option(kept | {key}, frozenset()).seconds
                if (now - seconds) / max(nbytes, 1) > gain:
                    best, gain, best_seconds = key, (now - seconds) / max(nbytes, 1), seconds
            if best is None:
                break
            kept |= {best}
            candidates.discard(best)
            left -= self.segment.contents[best].nbytes
            now = best_seconds
        return kept, frozenset()


def _made(step: Any) -> tuple[int, ...]:
    return (*step.makes, *(made for _, made in step.writes))


Frontiers = list[tuple[Segment, list[Option]]]


def frontiers(layout: Layout, costs: Costs, *, pack: bool) -> Frontiers:
    """Return the frontier of every segment; those that are alike are solved once."""
    solved: dict[object, tuple[Segment, list[Option]]] = {}
    found: Frontiers = []
    for segment in layout.segments:
        like = solved.get(segment.likeness)
        if like is None:
            options = Program(segment, costs, pack=pack).frontier()
            solved[segment.likeness] = segment, options
        else:
            program = Program(segment, costs, pack=pack)
            twin = dict(zip(like[0].contents, segment.contents, strict=True))
            options = [
                program.option(frozenset(twin[k] for k in o.keep), frozenset(twin[k] for k in o.pack)) for o in like[1]
            ]
        found.append((segment, options))
    return found


Chosen = list[tuple[Segment, Option]]


def least(layout: Layout, found: Frontiers) -> tuple[Chosen, int]:
    """Return the choice with the lowest peak, and that peak."""
    chosen = [(segment, options[0]) for segment, options in found]
    peak, _ = layout.peaks(chosen)
    for i, (segment, options) in enumerate(found):
        for option in options[1:]:
            trial = [*chosen[:i], (segment, option), *chosen[i + 1 :]]
            lower, _ = layout.peaks(trial)
            if lower < peak:
                chosen, peak = trial, lower
    return chosen, peak


def choose(layout: Layout, found: Frontiers, budget: int) -> Chosen | None:
    """Pick an option for each segment, so that the peak stays within the budget and least time is lost.

    Args:
        layout: the bytes of the step over time.
        found: the options.
        budget: bytes above what stood before the step.

    Returns:
        The choice, or None if no choice stays within the budget.
    """
    moves = [[layout.moves(segment, option) for option in options] for segment, options in found]
    times = _moments(layout, found, moves)
    replays: set[int] = set(range(len(found)))
    for _ in range(_ROUNDS):
        picked = _pick(layout, found, moves, sorted(times), sorted(replays), budget)
        if picked is None:
            return None
        chosen = [(segment, options[i]) for (segment, options), i in zip(found, picked, strict=True)]
        peak, at = layout.peaks(chosen)
        if peak <= budget:
            return chosen
        if at in times:
            return None
        times.add(at)
    return None


def _moments(layout: Layout, found: Frontiers, moves: list[list[Any]]) -> set[int]:
    """Return moments at which the bytes may be highest: between any two replays, with least and with most kept."""
    edges = sorted({0, layout.events, *(segment.again for segment, _ in found)})
    lean = layout.base + sum(m[0] for m in moves)
    full = layout.base + sum(m[-1] for m in moves)
    times: set[int] = set()
    for begin, end in pairwise(edges):
        if end > begin:
            times |= {begin + int(curve[begin:end].argmax()) for curve in (lean, full)}
    return times


def _pick(
    layout: Layout,
    found: Frontiers,
    moves: list[list[Any]],
    times: Sequence[int],
    replays: Sequence[int],
    budget: int,
) -> list[int] | None:
    rows: list[list[float]] = []
    limits: list[float] = []
    mega = float(2**20)
    for at in times:
        rows.append([moves[i][j][at] / mega for i, (_, options) in enumerate(found) for j in range(len(options))])
        limits.append((budget - float(layout.base[at])) / mega)
    for own in replays:
        before = max(found[own][0].again - 1, 0)
        rows.append(
            [
                (moves[i][j][before] + (option.replay_bytes if i == own else 0)) / mega
                for i, (_, options) in enumerate(found)
                for j, option in enumerate(options)
            ]
        )
        limits.append((budget - float(layout.base[before])) / mega)
    costs = [option.seconds for _, options in found for option in options]
    sizes = [len(options) for _, options in found]
    matrix, limit = np.array(rows), np.array(limits)
    return _pick_exactly(matrix, limit, costs, sizes) if has_solver() else _pick_greedily(matrix, limit, costs, sizes)


def _pick_exactly(matrix: Any, limit: Any, costs: list[float], sizes: list[int]) -> list[int] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    one = np.zeros((len(sizes), len(costs)))
    begin = 0
    for i, size in enumerate(sizes):
        one[i, begin : begin + size] = 1
        begin += size
    solved = milp(
        np.array(costs),
        constraints=[LinearConstraint(matrix, -np.inf, limit), LinearConstraint(one, 1, 1)],
        bounds=Bounds(0, 1),
        integrality=np.ones(len(costs)),
        options={"time_limit": 2.0, "mip_rel_gap": 1e-3},
    )
    if solved.x is None:
        return None
    picked: list[int] = []
    begin = 0
    for size in sizes:
        picked.append(int(np.argmax(solved.x[begin : begin + size])))
        begin += size
    return picked


def _pick_greedily(matrix: Any, limit: Any, costs: list[float], sizes: list[int]) -> list[int] | None:
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    picked = [0] * len(sizes)
    used = sum(matrix[:, begin] for begin in begins)
    if np.any(used > limit + 1e-9):
        return None
    while True:
        best, gain = None, 0.0
        for i, begin in enumerate(begins):
            for j in range(sizes[i]):
                saved = costs[begin + picked[i]] - costs[begin + j]
                more = matrix[:, begin + j] - matrix[:, begin + picked[i]]
                if saved > 0 and np.all(used + more <= limit + 1e-9):
                    worth = saved / max(float(more.max()), 1e-6)
                    if worth > gain:
                        best, gain = (i, j), worth
        if best is None:
            return picked
        i, j = best
        used = used + matrix[:, begins[i] + j] - matrix[:, begins[i] + picked[i]]
        picked[i] = j
