"""When the recorder measures, and how its journal grows: pure functions, driven through a million steps in a moment."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradctl._journal import JournalWriter, encode_norms
from gradctl._record._blocks import BACKWARD, Drain
from gradctl._record._budget import closes_block, closes_maxima, next_row, norm_gap, power_of_two
from gradctl._record._sketch import ELEMENTS, Places, gather, stride_for, sums
from gradctl._record._state import Costs, OptimizerState

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=4).filter(lambda found: math.prod(found) <= 3_000_000)


@given(sizes)
def test_the_stride_is_odd_and_coprime_to_every_size(shape: list[int]) -> None:
    numel = math.prod(shape)
    stride = stride_for(numel, shape)
    if numel <= ELEMENTS:
        assert stride == 1
    else:
        assert stride % 2 == 1
        assert all(math.gcd(stride, size) == 1 for size in shape)
        assert 1 <= (numel - 1) // stride + 1 <= ELEMENTS


@given(st.integers(33, 200), st.integers(33, 200))
def test_every_row_and_column_of_a_matrix_is_sampled_alike(rows: int, columns: int) -> None:
    stride = stride_for(rows * columns, [rows, columns])
    seen = [divmod(place, columns) for place in range(0, rows * columns, stride)]
    for line in ([row for row, _ in seen], [column for _, column in seen]):
        counts = [line.count(value) for value in set(line)]
        assert max(counts) - min(counts) <= 2 + len(seen) // min(rows, columns) // 4


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_a_gradient_is_sampled_where_its_weight_is_whatever_its_layout(
    shape: list[int], shuffle: random.Random
) -> None:
    order = list(range(len(shape)))
    shuffle.shuffle(order)
    weight = torch.randn(shape).permute(order)
    places = Places(weight)
    gradient = weight.clone(memory_format=torch.contiguous_format)
    assert torch.equal(places.of(weight), places.of(gradient))
    assert torch.equal(places.of(weight), places.of(weight.expand(1, *weight.shape)[0]))


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6))
def test_sums_of_sketches_are_those_of_their_parts(lengths: list[int]) -> None:
    tensors = [torch.randn(length) for length in lengths]
    places = [Places(tensor) for tensor in tensors]
    vector = gather(places, tensors)
    found = sums(vector, torch.tensor([place.count for place in places]))
    exact = [float(tensor[:: place.stride].double().sum()) for tensor, place in zip(tensors, places, strict=True)]
    assert found.tolist() == pytest.approx(exact, abs=1e-2)


seconds = st.floats(1e-6, 10.0)


@given(cost=seconds, step=seconds, budget=st.floats(1e-4, 0.5))
def test_the_norm_takes_at_most_half_the_budget(cost: float, step: float, budget: float) -> None:
    gap = norm_gap(cost=cost, step_seconds=step, budget=budget)
    assert gap >= 1
    if gap < 1000:
        assert cost / gap <= 0.5 * budget * step * (1 + 1e-9)
    if gap > 1:  # no rarer than it must be
        assert cost / (gap - 1) > 0.5 * budget * step * (1 - 1e-9)


@given(cost=st.floats(1e-6, 1e-2), step=st.floats(1e-5, 1.0), budget=st.floats(1e-3, 0.1))
def test_rows_take_at_most_half_the_budget_in_the_long_run(cost: float, step: float, budget: float) -> None:
    n, last, spent, first, number = 1, 0, 0.0, 1, 0
    while number < 400:
        spent += cost
        number += 1
        following = next_row(
            n,
            paired=last == n - 1,
            cost=cost,
            step_seconds=step,
            spent=spent,
            elapsed=n * step,
            budget=budget,
        )
        assert following > n
        n, last = following, n
        if number == 100:
            first = n
    assert 300 * cost <= 1.05 * (0.5 * budget * (n - first) * step) + 2 * cost


def rows_until(steps: int, cost: float, step: float = 0.05) -> set[int]:
    n, last, spent, found = 1, 0, 0.0, set[int]()
    while n <= steps:
        found.add(n)
        spent += cost
        following = next_row(
            n,
            paired=last == n - 1,
            cost=cost,
            step_seconds=step,
            spent=spent,
            elapsed=n * step,
            budget=0.01,
            aligned=True,
        )
        n, last = following, n
    return found


@given(st.floats(1e-5, 5e-3), st.floats(1e-5, 5e-3))
def test_ranks_with_gaps_of_their_own_share_the_rarer_ones_steps(one: float, other: float) -> None:
    rarer, denser = sorted((rows_until(3000, one), rows_until(3000, other)), key=len)
    assert len(rarer & denser) >= 0.3 * len(rarer)


@given(st.integers(1, 10**9))
def test_a_gap_is_rounded_up_to_a_power_of_two(gap: int) -> None:
    rounded = power_of_two(gap)
    assert gap <= rounded < 2 * gap or gap == rounded == 1
    assert rounded & (rounded - 1) == 0


@given(st.integers(0, 2**31))
def test_rows_of_a_long_run_keep_their_relative_spacing(seed: int) -> None:
    step = random.Random(seed).randint(10_000, 10_000_000)
    following = next_row(step, paired=True, cost=1e-5, step_seconds=0.1, spent=0.0, elapsed=0.1 * step, budget=0.01)
    assert following - step == step // 64


def simulate(path: Path, steps: int, step_seconds: float, tensors: int) -> int:
    """Write the journal of a run that has all the budget it wants, with a clock that is only counted."""
    draw = random.Random(0)
    writer = JournalWriter(path)
    now = 0.0
    costs = Costs(lambda: now, 1e9)
    state = OptimizerState(0, "AdamW", "MainThread")
    state.num = tensors
    stamps: list[object] = []

    def fold(_: OptimizerState, upto: int) -> None:
        state.peak = [10 ** draw.uniform(-5, 1) for _ in range(tensors)]
        state.totals = [(upto, draw.uniform(0.1, 1.0))]

    def nothing(*_: object) -> None:
        return None

    drain = Drain(stamps, {0: state}, writer, costs, nothing, nothing, fold)
    row, last = 1, 0
    for step in range(1, steps + 1):
        begin, now = now, now + step_seconds
        stamps += (BACKWARD, 1, begin, now, draw.random())
        stamps += (0, 1, now, now, None)
        if step == row:
            norms = [10 ** draw.uniform(-5, 1) for _ in range(tensors)]
            writer.write(
                "row", o=0, n=step, t=round(now, 4), g=encode_norms(norms), u=encode_norms(norms), tot=0.1234,
                none=0, zero=0, dead=0.01234, cos=0.1234, lr=[0.0001], rss=1234,
            )  # fmt: skip
            row, last = (
                next_row(
                    step,
                    paired=last == step - 1,
                    cost=1e-9,
                    step_seconds=step_seconds,
                    spent=0.0,
                    elapsed=now,
                    budget=1.0,
                ),
                step,
            )
        if step % 512 == 0:
            drain.empty()
    drain.empty()
    drain.close(state, now)
    writer.close()
    return writer.bytes


def test_the_journal_of_two_hundred_tensors_stays_small_at_a_thousand_steps(tmp_path: Path) -> None:
    assert simulate(tmp_path / "journal.rank0.jsonl", 1000, 0.05, 200) <= 700_000


@pytest.mark.slow
def test_the_journal_of_two_hundred_tensors_stays_small_at_a_million_steps(tmp_path: Path) -> None:
    assert simulate(tmp_path / "journal.rank0.jsonl", 1_000_000, 0.05, 200) <= 4_000_000


def test_lines_grow_with_the_logarithm_of_the_steps() -> None:
    blocks = maxima = steps = stretch = 0
    at_decades: list[tuple[int, int]] = []
    for done in range(1, 100_001):
        steps += 1
        stretch += 1
        if closes_block(steps=steps, done=done, seconds=1.0):
            blocks, steps = blocks + 1, 0
            if closes_maxima(steps=stretch, done=done):
                maxima, stretch = maxima + 1, 0
        if done in (1000, 10_000, 100_000):
            at_decades.append((blocks, maxima))
    first, second, third = at_decades
    assert third[0] - second[0] <= 1.3 * (second[0] - first[0] + 200)
    assert third[1] - second[1] <= 1.3 * (second[1] - first[1])


def test_tiny_steps_do_not_write_a_line_each() -> None:
    lines = steps = 0
    for done in range(1, 501):
        steps += 1
        if closes_block(steps=steps, done=done, seconds=steps * 0.0003):
            lines, steps = lines + 1, 0
    assert lines <= 500 * 0.0003 / 0.005 + 3
