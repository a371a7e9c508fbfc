"""Frozen rows, and the optimizer's state of them, do not move; the others move as they would."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl
from gradctl import FreezeRefused, PatternMatchesNothing, UsageError, _taps
from test_freeze_flags import OPTIMIZERS


class Net(nn.Module):
    def __init__(self, rows: int = 6, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(rows, width)
        self.head = nn.Linear(width, 4)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.embed(index))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int = 6, *, clip: float | None = None) -> None:
    optimizer.zero_grad()
    model(torch.arange(rows)).square().sum().backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


MASK = torch.zeros(6, 3, dtype=torch.bool)
MASK[1, 2] = MASK[4, :2] = True
CHOICES: dict[str, tuple[Any, list[int]]] = {
    "int": (2, [2]),
    "negative": (-1, [5]),
    "list": ([4, 1, 4], [1, 4]),
    "range": (range(2, 5), [2, 3, 4]),
    "slice": (slice(None, None, 2), [0, 2, 4]),
    "indices": (torch.tensor([5, 0]), [0, 5]),
    "numpy": (np.array([5, 0]), [0, 5]),
    "mask": (torch.tensor([True, False, True, False, False, False]), [0, 2]),
    "booleans": ([True, False, True, False, False, False], [0, 2]),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("choice", ["int", "list", "elements"])
@pytest.mark.parametrize("when", ["first", "later"])
def test_no_optimizer_moves_frozen_rows_nor_their_state(kind: str, choice: str, when: str) -> None:
    model = Net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    weight = model.embed.weight
    if when == "later":
        for _ in range(3):
            step(model, optimizer)
    wanted = MASK if choice == "elements" else CHOICES[choice][0]
    frozen_at = MASK if choice == "elements" else torch.zeros(6, 3, dtype=torch.bool)
    if choice != "elements":
        frozen_at[CHOICES[choice][1]] = True
    before = weight.detach().clone()
    state = copy.deepcopy(optimizer.state[weight]) if when == "later" else {}
    with gradctl.freeze(model, rows={"embed.weight": wanted}, optimizer=optimizer):
        for _ in range(3):
            step(model, optimizer)
            assert torch.equal(weight[frozen_at], before[frozen_at])
            assert torch.equal(weight.grad[frozen_at], torch.zeros(int(frozen_at.sum())))  # type: ignore[index]
        assert not (weight[~frozen_at] == before[~frozen_at]).any()
        for key, value in optimizer.state[weight].items():
            if isinstance(value, Tensor) and value.shape == weight.shape and key != "step_size":
                old = state[key] if when == "later" else torch.zeros(6, 3)
                assert torch.equal(value[frozen_at], old[frozen_at]), key
    for _ in range(2):  # Rprop rests for a step where the sign has changed
        step(model, optimizer)
    assert not (weight[frozen_at] == before[frozen_at]).any()
    assert _taps.installed() == []


@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_given_as_a_person_would(name: str) -> None:
    model = Net()
    wanted, expected = CHOICES[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.embed.weight.detach().clone()
    with gradctl.freeze(model, rows={"embed.weight": wanted}):
        step(model, optimizer)
    moved = (model.embed.weight != before).any(dim=1)
    assert moved.logical_not().nonzero().flatten().tolist() == expected


@given(st.integers(2, 8), st.data())
def test_the_other_rows_move_as_rows_of_an_embedding_of_their_own(rows: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1, max_size=rows - 1)))
    free = [row for row in range(rows) if row not in kept]
    model, oracle = Net(rows), Net(rows)
    oracle.embed = nn.Embedding.from_pretrained(model.embed.weight.detach()[free].clone(), freeze=False)
    mine = torch.optim.AdamW(model.embed.parameters(), lr=0.1, weight_decay=0.1)
    theirs = torch.optim.AdamW(oracle.embed.parameters(), lr=0.1, weight_decay=0.1)
    weights = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    with gradctl.freeze(model, rows={"embed.weight": kept}):
        for _ in range(3):
            mine.zero_grad()
            theirs.zero_grad()
            (model(torch.arange(rows)) * weights).sum().backward()
            (oracle(torch.arange(len(free))) * weights[free]).sum().backward()
            mine.step()
            theirs.step()
    torch.testing.assert_close(model.embed.weight[free], oracle.embed.weight)


def test_clipping_counts_only_what_trains() -> None:
    model = Net()
    model(torch.arange(6)).square().sum().backward()
    whole = nn.utils.get_total_norm([model.embed.weight.grad])  # type: ignore[list-item]
    model.zero_grad()
    with gradctl.freeze(model, rows={"embed.weight": range(3)}):
        model(torch.arange(6)).square().sum().backward()
        grad = model.embed.weight.grad
        assert grad is not None
        assert torch.equal(grad[:3], torch.zeros(3, 3))
        assert nn.utils.get_total_norm([grad]) == grad[3:].norm()
        assert grad.norm() < whole


def test_a_gradient_that_is_there_is_zeroed_and_comes_back_if_nothing_was_added() -> None:
    model = Net()
    model(torch.arange(6)).sum().backward()
    grad = model.embed.weight.grad
    with gradctl.freeze(model, rows={"embed.weight": [0]}):
        assert torch.equal(model.embed.weight.grad[0], torch.zeros(3))  # type: ignore[index]
    assert model.embed.weight.grad is grad


def test_sparse_gradients_lose_the_frozen_rows() -> None:
    for wanted in ([0, 3], slice(0, 2), MASK):
        model = Net()
        model.embed = nn.Embedding(6, 3, sparse=True)
        optimizer = torch.optim.SparseAdam(model.embed.parameters(), lr=0.1)
        before = model.embed.weight.detach().clone()
        with gradctl.freeze(model, rows={"embed.weight": wanted}):
            model(torch.tensor([0, 1, 1, 3, 4])).sum().backward()
            optimizer.step()
        kept = torch.zeros(6, 3, dtype=torch.bool)
        kept[wanted] = True
        assert torch.equal(model.embed.weight[kept], before[kept])
        assert not torch.equal(model.embed.weight[4, 2], before[4, 2])


def test_several_calls_hold_their_rows_each_and_go_in_any_order() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    first = gradctl.freeze(model, rows={"embed.weight": range(3), "head.bias": 0})
    second = gradctl.freeze(model, rows={"embed.weight": [2, 4]})
    before = model.embed.weight.detach().clone()
    step(model, optimizer)
    assert torch.equal(model.embed.weight[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    first.remove()
    step(model, optimizer)
    assert torch.equal(model.embed.weight[[2, 4]], before[[2, 4]])
    assert not torch.equal(model.embed.weight[0], before[0])
    second.remove()
    step(model, optimizer)
    assert not torch.equal(model.embed.weight[4], before[4])


def test_rows_hold_also_while_the_whole_is_frozen_and_after_it_is_not() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = gradctl.freeze(model, "embed")
    before = model.embed.weight.detach().clone()
    rows = gradctl.freeze(model, rows={"embed.weight": 1})
    assert not model.embed.weight.requires_grad
    step(model, optimizer)
    assert torch.equal(model.embed.weight, before)
    whole.remove()
    step(model, optimizer)
    assert torch.equal(model.embed.weight[1], before[1])
    assert not torch.equal(model.embed.weight[2], before[2])
    rows.remove()


def test_a_value_set_by_hand_between_steps_is_the_one_that_is_kept() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with gradctl.freeze(model, rows={"embed.weight": 0}):
        step(model, optimizer)
        with torch.no_grad():
            model.embed.weight[0] = 7.0
        step(model, optimizer)
    assert torch.equal(model.embed.weight[0], torch.full((3,), 7.0))


def test_a_second_derivative_sees_the_frozen_rows_as_constants() -> None:
    model = Net()
    with gradctl.freeze(model, rows={"embed.weight": [0, 1]}):
        loss = model.embed(torch.arange(6)).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, [model.embed.weight], create_graph=True)
        grad.square().sum().backward()
        second = model.embed.weight.grad
        expected = 36 * model.embed.weight.detach() ** 3
        expected[:2] = 0
        assert second is not None
        torch.testing.assert_close(second, expected)


def test_rows_under_a_gradient_scaler_a_clip_and_a_compiled_model() -> None:
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    before = model.embed.weight.detach().clone()
    with gradctl.freeze(compiled, rows={"embed.weight": [0, 5]}):
        scaler.scale(compiled(torch.arange(6)).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(model.embed.weight[[0, 5]], before[[0, 5]])
    assert not torch.equal(model.embed.weight[1:5], before[1:5])


def test_a_parameter_that_is_replaced_after_its_rows_were_frozen_is_told_at_the_next_step() -> None:
    model = Net()
    frozen = gradctl.freeze(model, rows={"embed.weight": [0]})
    model.embed.weight = nn.Parameter(torch.zeros(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FreezeRefused, match=r"rows of embed.weight are frozen no longer"):
        step(model, optimizer)
    frozen.remove()
    step(model, optimizer)


def test_lbfgs_is_refused_with_rows() -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters())
    with (
        gradctl.freeze(model, rows={"embed.weight": [0, 1]}),
        pytest.raises(FreezeRefused, match="LBFGS would move rows 0-1 of 6"),
    ):
        optimizer.step(lambda: model(torch.arange(6)).sum())


@pytest.mark.parametrize(
    ("rows", "error", "sentence"),
    [
        ({"embd.weight": 0}, PatternMatchesNothing, "did you mean 'embed.weight'"),
        ({"embed.weight": 6}, UsageError, "row 6 of embed.weight, which has 6 rows"),
        ({"embed.weight": []}, UsageError, "no rows of embed.weight"),
        ({"embed.weight": range(6)}, UsageError, "all 6 rows of embed.weight"),
        ({"embed.weight": torch.zeros(5, dtype=torch.bool)}, UsageError, r"the mask for embed.weight has shape \[5\]"),
        ({"embed.weight": torch.zeros(6, 3, dtype=torch.bool)}, UsageError, "no elements of embed.weight"),
        ({"embed.weight": "first"}, UsageError, "rows are a number, numbers, a range, a slice, or a mask"),
        ({"embed.weight": 0.5}, UsageError, "rows are a number, numbers, a range, a slice, or a mask"),
        ({"embed.weight": torch.tensor([0.0])}, UsageError, "rows are a number, numbers, a range, a slice, or a mask"),
        ({"scale": 0}, UsageError, "rows of scale, which is a single number"),
        ({"codes": 0}, UsageError, "rows of codes, which is torch.int8"),
        ({"lazy.weight": 0}, FreezeRefused, "rows of lazy.weight, which is a UninitializedParameter"),
    ],
)
def test_what_are_no_rows_is_refused(rows: Any, error: type[Exception], sentence: str) -> None:
    model = Net()
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model.lazy = nn.LazyLinear(3)
    with pytest.raises(error, match=sentence):
        gradctl.freeze(model, "head.bias", rows=rows)
    assert model.head.bias.requires_grad
    assert _taps.installed() == []
