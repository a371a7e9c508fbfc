"""Norms, ratios, cosines and clipping against full tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flights import close, plain_and_recorded, recorded
from trainings import batches, measured_by_hand, mlp


def test_rows_agree_with_full_tensors(tmp_path: Path) -> None:
    (norms, ratios, cosines), _, journal = plain_and_recorded(tmp_path, lambda: measured_by_hand(mlp(), 30))
    assert [row.n for row in journal.rows[:5]] == [1, 2, 3, 4, 5]
    for row in journal.rows:
        exact = norms[row.n - 1]
        assert all(close(code, value) for code, value in zip(row.g, exact, strict=True))
        assert row.tot == pytest.approx(math.hypot(*exact), rel=1e-3)
        # Every tensor has fewer elements than a sketch: nothing is sampled.
        assert all(close(code, value) for code, value in zip(row.u, ratios[row.n - 1], strict=True))
        if row.cos is not None:
            assert row.cos == pytest.approx(cosines[row.n - 1], abs=1e-3)
    assert sum(row.cos is not None for row in journal.rows) >= 5


def test_maxima_are_the_largest_norms_of_their_stretch(tmp_path: Path) -> None:
    (norms, _, _), _, journal = plain_and_recorded(tmp_path, lambda: measured_by_hand(mlp(), 60))
    assert sum(stretch.c for stretch in journal.maxima) == 60
    for stretch in journal.maxima:
        steps = norms[stretch.n - 1 : stretch.last]
        assert all(close(code, max(column)) for code, column in zip(stretch.g, zip(*steps, strict=True), strict=True))


def test_a_sketch_of_a_large_tensor_is_near_the_full_figures(tmp_path: Path) -> None:
    def train() -> Any:
        model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3))
        return measured_by_hand(model, 12)

    (_, ratios, cosines), _, journal = plain_and_recorded(tmp_path, train)
    for row in journal.rows:
        for code, value in zip(row.u, ratios[row.n - 1], strict=True):
            assert code == pytest.approx(value, rel=0.15)
        if row.cos is not None:
            assert row.cos == pytest.approx(cosines[row.n - 1], abs=0.1)


def test_clipping_is_counted_with_the_norm_before_it(tmp_path: Path) -> None:
    befores: list[float] = []

    def train() -> None:
        befores.clear()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            befores.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.9)))
            optimizer.step()

    _, _, journal = plain_and_recorded(tmp_path, train)
    clips = [block.clip for block in journal.blocks if block.clip is not None]
    assert sum(clip.calls for clip in clips) == 10
    assert sum(clip.clipped for clip in clips) == sum(norm > 0.9 for norm in befores)
    assert {clip.limit for clip in clips} == {0.9}
    assert max(clip.max_norm for clip in clips) == pytest.approx(max(befores), rel=1e-3)
    assert max(clip.worst_ratio for clip in clips) == pytest.approx(max(befores) / 0.9, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_every_precision_are_taken_without_overflow(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(100, 100, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with recorded(tmp_path) as flight:
        for _ in range(7):
            weight.grad = torch.full_like(weight, 1000.0)
            optimizer.step()
    assert not flight.journal.named("nonfinite")
    assert all(close(row.g[0], 1e5) for row in flight.journal.rows)


def test_gradients_whose_squares_vanish_are_not_called_zero(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with recorded(tmp_path) as flight:
        for number in range(4):
            weight.grad = torch.full_like(weight, 1e-30 if number else 0.0)
            optimizer.step()
    assert [row.zero for row in flight.journal.rows] == [1, 0, 0, 0]
    assert close(flight.journal.rows[1].g[0], 1e-30 * math.sqrt(10))


def test_sparse_gradients_are_read_by_their_values(tmp_path: Path) -> None:
    table = nn.Embedding(50, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    exact: list[float] = []
    with recorded(tmp_path) as flight:
        for number in range(5):
            optimizer.zero_grad()
            table(torch.arange(number, number + 6)).pow(2).sum().backward()
            assert table.weight.grad is not None
            exact.append(float(table.weight.grad.to_dense().norm()))
            optimizer.step()
    assert all(close(row.g[0], value) for row, value in zip(flight.journal.rows, exact, strict=True))
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0


def test_complex_channels_last_empty_and_scalar_tensors_are_read(tmp_path: Path) -> None:
    params = [
        nn.Parameter(torch.randn(4, 4, dtype=torch.complex64)),
        nn.Parameter(torch.randn(70, 4, 3, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(60, 50).t()),
    ]
    optimizer = torch.optim.SGD(params, lr=0.1)
    exact: list[list[float]] = []
    ratios: list[list[float]] = []
    with recorded(tmp_path) as flight:
        for _ in range(6):
            for param in params:
                param.grad = torch.randn(param.shape, dtype=param.dtype)  # contiguous, whatever the parameter is
            before = [p.detach().clone() for p in params]
            exact.append([float(p.grad.abs().double().norm()) for p in params if p.grad is not None])
            optimizer.step()
            ratios.append([float((p.detach() - b).norm() / b.norm()) for p, b in zip(params, before, strict=True)])
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0
    for row, norms, ratio in zip(flight.journal.rows, exact, ratios, strict=False):
        assert [index for index, code in enumerate(row.g) if code is None] == [2]
        for index in (0, 1, 3, 4):
            assert close(row.g[index], norms[index])
            assert row.u[index] == pytest.approx(ratio[index], rel=0.2)
        if row.n > 1:
            assert row.cos is not None
            assert abs(row.cos) < 0.2


def test_autocast_does_not_round_what_is_measured(tmp_path: Path) -> None:
    def train() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return measured_by_hand(mlp(), 8)

    (norms, ratios, _), _, journal = plain_and_recorded(tmp_path, train)
    for row in journal.rows:
        assert all(close(code, value) for code, value in zip(row.g, norms[row.n - 1], strict=True))
        assert all(close(code, value) for code, value in zip(row.u, ratios[row.n - 1], strict=True))


def test_norms_and_rows_that_wait_on_a_device_say_the_same_at_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (norms, _, _), _, near = plain_and_recorded(tmp_path, lambda: measured_by_hand(mlp(), 20))
    monkeypatch.setattr("gradctl._record._quiet.is_here", lambda tensor: False)
    _, _, far = plain_and_recorded(tmp_path, lambda: measured_by_hand(mlp(), 20))
    assert far.end is not None
    assert far.end.faults == 0
    assert sum(stretch.c for stretch in far.maxima) == 20
    totals = [block.norm[1] for block in far.blocks if block.norm is not None]
    assert max(totals) == pytest.approx(max(math.hypot(*step) for step in norms), rel=1e-3)
    by_step = {row.n: row for row in near.rows}
    for row in far.rows:
        if row.n in by_step:
            assert (row.g, row.u, row.cos) == (by_step[row.n].g, by_step[row.n].u, by_step[row.n].cos)
