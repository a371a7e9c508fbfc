"""A step's gradient is that of one big batch, however the batch is cut; the oracle is one big batch in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gradctl

IGNORED = -100


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))


def token_loss(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), ignore_index=IGNORED, reduction=reduction)


def big_batch_gradient(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    clone = copy.deepcopy(model).to(dtype)
    loss = token_loss(clone, x.to(dtype), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(clone.parameters()))]).double()


class Seen:
    """Optimizers that only remember the gradients they are given."""

    def __init__(self, model: nn.Sequential, count: int) -> None:
        parameters = list(model.parameters())
        shares = [parameters[index::count] for index in range(count)]
        self.optimizers = [torch.optim.SGD(share, lr=0.0) for share in shares]
        self.parameters = parameters
        self.gradient = torch.zeros(0)
        self.optimizers[-1].register_step_post_hook(self._look)

    def _look(self, *_: Any) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]).double()


def rounding_scale(model: nn.Module, x: Tensor, y: Tensor, exact: Tensor) -> float:
    """The error of one big float32 batch, and that of a batch cut into single rows, whichever is larger."""
    whole = (big_batch_gradient(model, x, y, torch.float32) - exact).norm()
    total = torch.zeros_like(exact)
    kept = int((y != IGNORED).sum())
    for row in range(x.shape[0]):
        count = int((y[row] != IGNORED).sum())
        if count:
            total += big_batch_gradient(model, x[row : row + 1], y[row : row + 1], torch.float32) * (count / kept)
    return float(torch.maximum(whole, (total - exact).norm())) + 1e-9 * float(exact.norm())


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[int], int, float]:
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any))
    return draw(st.integers(0, 10_000)), sizes, draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 0.3, 0.8]))


@settings(max_examples=40)
@given(cut=cuts(), how=st.sampled_from(["loss", "tokens", "sum", "by hand"]))
def test_any_cut_into_microbatches_gives_the_gradient_of_one_big_batch(
    cut: tuple[int, list[int], int, float], how: str
) -> None:
    seed, sizes, count, ignored = cut
    model = network(seed)
    x, y = torch.randn(sum(sizes), 3, 6), torch.randint(0, 4, (sum(sizes), 3))
    y[torch.rand(y.shape) < ignored] = IGNORED
    y[0, 0] = 1
    exact = big_batch_gradient(model, x, y, torch.float64)
    seen = Seen(model, count)
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    options: dict[str, Any] = {"tokens": {"items": "tokens"}, "sum": {"items": "tokens", "loss": "sum"}}.get(how, {})
    step = gradctl.Step(model, seen.optimizers, accumulate=len(parts), **options)
    reduction = "sum" if how == "sum" else "mean"
    if how == "by hand":
        for bx, by in parts:
            with step.forward():
                loss = token_loss(model, bx, by)
            step.backward(loss, items=(by != IGNORED).sum())
        assert step.ready
        result = step.update()
    else:
        result = step(parts, lambda part: token_loss(model, part[0], part[1], reduction))
    assert result.items == int((y != IGNORED).sum())
    assert not result.skipped
    error = float((seen.gradient - exact).norm())
    assert error <= 4 * rounding_scale(model, x, y, exact)
    assert result.loss == pytest.approx(token_loss(copy.deepcopy(model).double(), x.double(), y).item(), rel=1e-5)


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), seed=st.integers(0, 999))
def test_rows_weigh_a_regression_whose_loss_does_not_say_what_it_is_a_mean_of(sizes: list[int], seed: int) -> None:
    model = network(seed)
    x, y = torch.randn(sum(sizes), 6), torch.randn(sum(sizes), 4)

    def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - y).square().sum(1).mean() + 0.0 * sum(p.sum() for p in net.parameters())

    double = copy.deepcopy(model).double()
    exact = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss_of(double, x.double(), y.double()), list(double.parameters()))]
    )
    seen = Seen(model, 1)
    step = gradctl.Step(model, seen.optimizers, accumulate=len(sizes), items="rows")
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    step(parts, lambda part: loss_of(model, part[0], part[1]))
    assert float((seen.gradient - exact).norm()) <= 5e-6 * float(exact.norm())


def test_the_mean_of_microbatch_means_is_wrong_where_step_is_right() -> None:
    model = network()
    x, y = torch.randn(10, 6), torch.randint(0, 4, (10,))
    exact = big_batch_gradient(model, x, y, torch.float64)
    parts = list(zip(x.split(4), y.split(4), strict=True))  # 4, 4 and 2 rows
    by_count = sum(big_batch_gradient(model, bx, by, torch.float64) / len(parts) for bx, by in parts)
    assert float((by_count - exact).norm() / exact.norm()) > 0.05  # pyright: ignore[reportAttributeAccessIssue]
    seen = Seen(model, 1)
    gradctl.Step(model, seen.optimizers, accumulate=3)(parts, lambda part: token_loss(model, *part))
    assert float((seen.gradient - exact).norm() / exact.norm()) < 1e-6


def test_a_step_of_one_microbatch_is_bitwise_the_loop_written_by_hand() -> None:
    batches = [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(5)]
    by_hand, by_step = network(), network()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01)
    for x, y in batches:
        optimizer.zero_grad()
        token_loss(by_hand, x, y).backward()
        optimizer.step()
    step = gradctl.Step(by_step, torch.optim.AdamW(by_step.parameters(), lr=0.01))
    losses = [result.loss for result in step.epoch(batches, lambda batch: token_loss(by_step, *batch))]
    assert all(map(torch.equal, by_hand.parameters(), by_step.parameters()))
    assert len(losses) == 5


def test_equal_microbatches_are_bitwise_those_divided_by_hand() -> None:
    parts = [(torch.randn(4, 6), torch.randint(0, 4, (4,))) for _ in range(3)]
    by_hand, by_step = network(), network()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for x, y in parts:
        (token_loss(by_hand, x, y) * (1 / 3)).backward()
    optimizer.step()
    step = gradctl.Step(by_step, torch.optim.SGD(by_step.parameters(), lr=0.1), accumulate=3)
    step(parts, lambda part: token_loss(by_step, *part))
    assert all(map(torch.equal, by_hand.parameters(), by_step.parameters()))


def test_an_empty_microbatch_poisons_nothing_even_if_its_loss_is_nan() -> None:
    model = network()
    x, y = torch.randn(4, 6), torch.randint(0, 4, (4,))
    exact = big_batch_gradient(model, x, y, torch.float64)
    seen = Seen(model, 1)
    step = gradctl.Step(model, seen.optimizers, accumulate=2)
    step.backward(token_loss(model, x, y))
    empty = token_loss(model, x, torch.full((4,), IGNORED))
    assert math.isnan(empty.item())
    step.backward(empty)
    result = step.update()
    assert (result.items, result.microbatches, result.skipped) == (4, 2, False)
    assert math.isfinite(result.loss)
    assert float((seen.gradient - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_microbatch_runs_neither_forward_nor_backward_of_a_whole_step(first: bool) -> None:
    model = network()
    parts = [(torch.randn(0, 6), torch.zeros(0, dtype=torch.long)), (torch.randn(4, 6), torch.randint(0, 4, (4,)))]
    called: list[int] = []

    def loss_fn(part: tuple[Tensor, Tensor]) -> Tensor:
        called.append(len(part[0]))
        return token_loss(model, *part)

    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2, items="rows")
    result = step(parts if first else parts[::-1], loss_fn)
    assert called == [4]
    assert result.items == 4


def test_a_step_without_any_item_changes_nothing() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = gradctl.Step(model, optimizer, accumulate=2, scheduler=scheduler)
    step.backward(None, items=0)
    step.backward(None, items=0)
    result = step.update()
    assert result.skipped
    assert result.items == 0
    assert math.isnan(result.loss)
    assert scheduler.last_epoch == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_flush_applies_what_is_left_divided_by_what_it_holds() -> None:
    model = network()
    x, y = torch.randn(7, 6), torch.randint(0, 4, (7,))
    exact = big_batch_gradient(model, x, y, torch.float64)
    seen = Seen(model, 1)
    step = gradctl.Step(model, seen.optimizers, accumulate=8)
    for bx, by in zip(x.split(3), y.split(3), strict=True):
        with step.forward():
            loss = token_loss(model, bx, by)
        step.backward(loss)
    assert not step.ready
    result = step.flush()
    assert result is not None
    assert (result.items, result.microbatches) == (7, 3)
    assert float((seen.gradient - exact).norm() / exact.norm()) < 1e-6
    assert step.flush() is None


def test_an_epoch_ends_with_as_many_microbatches_as_are_left() -> None:
    model = network()
    loader = [(torch.randn(4, 6), torch.randint(0, 4, (4,))) for _ in range(7)]
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=3)
    results = list(step.epoch(loader, lambda batch: token_loss(model, *batch)))
    assert [result.microbatches for result in results] == [3, 3, 1]


def test_gradients_that_something_else_has_left_are_no_part_of_a_step() -> None:
    model, clean = network(), network()
    x, y = torch.randn(4, 6), torch.randint(0, 4, (4,))
    token_loss(model, x, 3 - y).backward()  # a look at a gradient, say
    for each in (model, clean):
        step = gradctl.Step(each, torch.optim.SGD(each.parameters(), lr=0.1))
        step([(x, y)], lambda batch, each=each: token_loss(each, *batch))
    assert all(map(torch.equal, model.parameters(), clean.parameters()))


def test_a_loss_that_raises_leaves_no_half_step() -> None:
    model, clean = network(), network()
    parts = [(torch.randn(4, 6), torch.randint(0, 4, (4,))) for _ in range(2)]
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2)
    broken = iter([True, False])

    def fails_second(part: Any) -> Tensor:
        if next(broken):
            return token_loss(model, *part)
        raise KeyError("no such batch")

    with pytest.raises(KeyError):
        step(parts, fails_second)
    step(parts, lambda part: token_loss(model, *part))
    other = gradctl.Step(clean, torch.optim.SGD(clean.parameters(), lr=0.1), accumulate=2)
    other(parts, lambda part: token_loss(clean, *part))
    assert all(map(torch.equal, model.parameters(), clean.parameters()))


@pytest.mark.parametrize("mode", ["fp32", "bf16-autocast", "bf16-master", "bf16-stochastic", "bf16-kahan"])
def test_precisions_train_through_step(mode: Any) -> None:
    model = network()
    x, y = torch.randn(64, 6), torch.randint(0, 4, (64,))
    with gradctl.Step(model, torch.optim.AdamW(model.parameters(), lr=0.01), accumulate=4, precision=mode) as step:
        losses = [
            next(step.epoch(list(zip(x.split(16), y.split(16), strict=True)), lambda b: token_loss(model, *b))).loss
            for _ in range(30)
        ]
    assert losses[-1] < 0.8 * losses[0]


def test_a_count_over_processes_divides_before_the_gradients_are_summed() -> None:
    model = network()
    x, y = torch.randn(10, 6), torch.randint(0, 4, (10,))
    exact = big_batch_gradient(model, x, y, torch.float64)
    other = big_batch_gradient(model, x[6:], y[6:], torch.float64) * 0.4  # what the other process has, divided by 10
    seen = Seen(model, 1)
    step = gradctl.Step(model, seen.optimizers, accumulate=2)
    order: list[str] = []

    def count(items: float) -> float:
        order.append("count")
        return items + 4

    def sync() -> None:
        order.append("sync")
        offset = 0
        for parameter in model.parameters():
            assert parameter.grad is not None
            size = parameter.numel()
            parameter.grad += other[offset : offset + size].view(parameter.shape).float()
            offset += size

    step._order.count_all, step._order.sync = count, sync
    step(list(zip(x[:6].split(3), y[:6].split(3), strict=True)), lambda part: token_loss(model, *part))
    assert order == ["count", "sync"]
    assert float((seen.gradient - exact).norm() / exact.norm()) < 1e-6


def test_the_microbatch_loop_of_the_page_needs_no_items_for_known_losses() -> None:
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy_with_logits,
        lambda a, b: (a - b).square().mean(),
    ]
    x, y = torch.randn(5, 6), torch.rand(5, 4)
    for loss_fn in losses:
        model = network()
        exact = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))]
        ).double()
        seen = Seen(model, 1)
        step = gradctl.Step(model, seen.optimizers, accumulate=2)
        for bx, by in ((x[:4], y[:4]), (x[4:], y[4:])):
            step.backward(loss_fn(model(bx), by))
        assert step.update().items == 20
        assert float((seen.gradient - exact).norm() / exact.norm()) < 1e-6
