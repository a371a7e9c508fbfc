"""gradient_noise_scale: unbiased against the exact moments of a known distribution, with an honest error bar."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import gradctl
from sampled_nets import build, ce


def flat_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for a, b in zip(x.split(1), y.split(1), strict=True):
        grads = torch.autograd.grad(ce(model(a), b), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer", "lstm", "weight norm"])
def test_it_is_the_ratio_of_the_unbiased_moments_of_the_rows(kind: str) -> None:
    model, x, y = build(kind)
    rows = flat_gradients(model, x, y)
    trace = float(rows.var(0).sum())
    squared = float(rows.mean(0).square().sum()) - trace / len(rows)
    found = gradctl.gradient_noise_scale(model, ce, (x, y))
    assert math.isclose(found.trace, trace, rel_tol=1e-10)
    assert math.isclose(found.squared_norm, squared, rel_tol=1e-8)
    assert found.value == (pytest.approx(trace / squared) if squared > 0 else math.inf)
    assert (found.units, found.unit_size) == (len(x), 1)


def test_parts_of_the_batch_give_the_moments_of_the_parts() -> None:
    model, x, y = build("mlp")
    rows = flat_gradients(model, x, y).reshape(3, 2, -1).mean(1)
    trace = 2 * float(rows.var(0).sum())
    squared = float(rows.mean(0).square().sum()) - trace / 6
    found = gradctl.gradient_noise_scale(model, ce, (x, y), microbatch=2)
    assert math.isclose(found.trace, trace, rel_tol=1e-10)
    assert math.isclose(found.squared_norm, squared, rel_tol=1e-8)
    by_sum = gradctl.gradient_noise_scale(
        model, lambda o, t: nn.functional.cross_entropy(o, t, reduction="sum"), (x, y), microbatch=2, reduction="sum"
    )
    assert math.isclose(by_sum.trace, found.trace, rel_tol=1e-10)


class Mean(nn.Module):
    """The gradient of sample x of `(x * w).sum()` is x itself: a distribution of our choice."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(wide, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def draws(count: int, size: int, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [0.5 + torch.randn(size, 20, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("microbatch", [1, 4])
def test_the_moments_are_unbiased_and_the_error_bar_covers_the_truth(microbatch: int) -> None:
    model = Mean(20)  # tr(S) = 20, |G|^2 = 20 / 4: a noise scale of 4
    found = [
        gradctl.gradient_noise_scale(model, lambda o: o.sum(1).mean(), x, microbatch=microbatch, check="off")
        for x in draws(60, 64, 0)
    ]
    mean = sum(one.trace for one in found) / 60, sum(one.squared_norm for one in found) / 60
    assert abs(mean[0] - 20) < 0.5
    assert abs(mean[1] - 5) < 0.25
    near = sum(abs(one.value - 4) < 2 * one.stderr for one in found)
    assert 50 <= near <= 60
    spread = torch.tensor([one.value for one in found]).std()
    typical = torch.tensor([one.stderr for one in found]).mean()
    assert 0.7 < float(typical / spread) < 1.4


def test_no_signal_is_told_as_such() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 20, dtype=torch.float64)
    found = gradctl.gradient_noise_scale(Mean(20), lambda o: o.sum(1).mean(), x - x.mean(0))
    assert found.squared_norm < 0
    assert (found.value, found.stderr) == (math.inf, math.inf)


def test_no_noise_is_told_as_such() -> None:
    x = torch.ones(8, 20, dtype=torch.float64)
    found = gradctl.gradient_noise_scale(Mean(20), lambda o: o.sum(1).mean(), x)
    assert abs(found.trace) < 1e-12
    assert found.value < 1e-12


def test_batch_norm_needs_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    data = torch.randn(16, 4), torch.randint(3, (16,))
    with pytest.raises(gradctl.NotPerSample, match="BatchNorm1d"):
        gradctl.gradient_noise_scale(model, ce, data)
    before = model[1].running_mean.clone()
    assert gradctl.gradient_noise_scale(model, ce, data, microbatch=4).units == 4
    assert torch.equal(model[1].running_mean, before)


def test_bad_input_has_its_sentence() -> None:
    model, x, y = build("mlp")
    with pytest.raises(gradctl.UsageError, match="microbatch=4 does not divide the 6 samples"):
        gradctl.gradient_noise_scale(model, ce, (x, y), microbatch=4)
    with pytest.raises(gradctl.UsageError, match="6 samples in units of 6 are fewer than two units"):
        gradctl.gradient_noise_scale(model, ce, (x, y), microbatch=6)
    with pytest.raises(gradctl.UsageError, match="reduction is 'mean' or 'sum', got 'share'"):
        gradctl.gradient_noise_scale(model, ce, (x, y), reduction="share")  # type: ignore[arg-type]
    with pytest.raises(gradctl.UsageError, match="averages over its batch"):
        gradctl.gradient_noise_scale(model, ce, (x, y), reduction="sum")
