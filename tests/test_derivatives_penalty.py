"""gradient_penalty: the value written by hand, a gradient that finite differences confirm, and no nan at zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl


def critic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def inputs(size: int = 5) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(size, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("target", [0.0, 0.1, 1.0])
def test_its_value_is_the_one_written_by_hand(target: float, sides: Any) -> None:
    model, x = critic(), inputs()
    norms = torch.stack(
        [torch.autograd.grad(model(row[None]).sum(), row)[0].norm() for row in x.detach().requires_grad_().unbind()]
    )
    off = norms - target
    expected = (off.clamp(min=0) if sides == "one" else off) ** 2
    found = gradctl.gradient_penalty(model(x), x, target=target, sides=sides, reduction="none").detach()
    assert float((found - expected).abs().max()) < 1e-14
    for reduction, one in (("mean", expected.mean()), ("sum", expected.sum())):
        got = gradctl.gradient_penalty(model(x), x, target=target, sides=sides, reduction=reduction)  # type: ignore[arg-type]
        assert abs(float(got.detach()) - float(one)) < 1e-14


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_its_gradient_reaches_the_weights_and_is_the_finite_difference(target: float) -> None:
    model, x = critic(), inputs()
    weight = model[0].weight
    torch.manual_seed(2)
    v, step = torch.randn_like(weight), 1e-6

    def value() -> Tensor:
        return gradctl.gradient_penalty(model(x), x, target=target)

    g = torch.autograd.grad(value(), weight)[0]
    weight.data += step * v
    up = float(value().detach())
    weight.data -= 2 * step * v
    down = float(value().detach())
    assert abs(float((g * v).sum()) - (up - down) / (2 * step)) < 1e-8


def test_it_builds_its_graph_also_where_recording_is_off() -> None:
    model, x = critic(), inputs()
    outputs = model(x)
    with torch.no_grad():
        penalty = gradctl.gradient_penalty(outputs, x)
    penalty.backward()
    assert float(model[0].weight.grad.abs().max()) > 0


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_gradient_of_exactly_zero_gives_no_nan_at_any_order(target: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # no unit is alive: d output / d input is exactly zero
    x = torch.randn(5, 3, requires_grad=True)
    penalty = gradctl.gradient_penalty(model(x), x, target=target)
    assert float(penalty.detach()) == target**2
    weights = list(model.parameters())
    first = torch.autograd.grad(penalty, weights, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(
        sum(g.square().sum() for g in first), weights, allow_unused=True, materialize_grads=True
    )
    assert all(bool(torch.isfinite(g).all()) for g in (*first, *second))


def test_the_norm_by_hand_is_nan_there() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    x.square().sum(1).sqrt().sum().backward()
    assert bool(torch.isnan(x.grad).any())


@given(st.sampled_from([1e-38, 1e-30, 1e-22, 1.0, 1e15]), st.integers(1, 4))
@settings(max_examples=12)
def test_gradients_that_float32_cannot_square_have_the_right_derivative(size: float, count: int) -> None:
    x = torch.ones(count, 4, requires_grad=True)
    w = torch.full((4,), size, requires_grad=True)
    g = torch.autograd.grad(gradctl.gradient_penalty(x @ w, x, target=0.5), w)[0]
    # The norm is twice the size; its derivative is the direction, 1/2 in each of four elements.
    assert torch.allclose(g, torch.full((4,), 2 * (2 * size - 0.5) * 0.5), rtol=1e-5)


def test_the_norm_of_several_inputs_is_joint() -> None:
    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    outputs = a @ w + (4 / 3) * (b @ w)
    found = gradctl.gradient_penalty(outputs, [a, b], target=0.0, reduction="none")
    assert float((found.detach() - 25).abs().max()) < 1e-12


def test_a_convolution_has_the_double_backward_written_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 16, 1))
    x = torch.randn(4, 1, 6, 6, requires_grad=True)
    found = torch.autograd.grad(gradctl.gradient_penalty(model(x), x), list(model.parameters()), allow_unused=True)
    g = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    by_hand = torch.autograd.grad(
        ((g.flatten(1).norm(dim=1) - 1) ** 2).mean(), list(model.parameters()), allow_unused=True
    )
    for a, b in zip(found, by_hand, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).abs().max()) < 1e-6


# ---- refusals


def test_batch_norm_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = inputs()
    with pytest.raises(gradctl.NotPerSample, match="BatchNorm in training mode lies between inputs and outputs"):
        gradctl.gradient_penalty(model(x), x)
    gradctl.gradient_penalty(model.eval()(x), x)


def test_fused_attention_is_refused_by_name() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(3, 5, 4, requires_grad=True)
    outputs = model(x, x, x, need_weights=False)[0].flatten(1).sum(1)
    with pytest.raises(gradctl.NoSecondDerivative, match="ScaledDotProduct"):
        gradctl.gradient_penalty(outputs, x)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda m, x: (m(x.detach()), x.detach()), "inputs takes no gradient"),
        (lambda m, x: (m(x.detach().clone()), x), "outputs do not depend on inputs"),
        (lambda m, x: (m(x).detach(), x), "outputs have no graph"),
        (lambda m, x: (m[:2](x), x), r"outputs have shape \[5, 8\] for 5 samples, not one number each"),
        (lambda m, x: (m(x).mean(), x), r"outputs have shape \[\] for 5 samples"),
        (lambda m, x: (m(x), []), "gradient_penalty got no inputs"),
        (lambda m, x: (m(x), [x, torch.zeros(2, 3, requires_grad=True)]), r"inputs\[1\] has shape \[2, 3\]"),
        (lambda m, x: (m(x), [x, torch.zeros(5, 3, requires_grad=True)]), r"outputs do not depend on inputs\[1\]"),
        (lambda m, x: (m(x[:0]), x[:0].detach().requires_grad_()), "gradient_penalty got no samples"),
    ],
)
def test_what_cannot_be_penalised_is_refused(make: Any, sentence: str) -> None:
    outputs, x = make(critic(), inputs())
    with pytest.raises(gradctl.UsageError, match=sentence):
        gradctl.gradient_penalty(outputs, x)


def test_a_penalty_that_reaches_nothing_is_refused() -> None:
    model, x = critic().requires_grad_(False), inputs()
    linear = model[2].weight.new_ones(3)
    with pytest.raises(gradctl.UsageError, match="the penalty has no gradient"):
        gradctl.gradient_penalty(x @ linear, x)


def test_bad_choices_have_their_sentence() -> None:
    model, x = critic(), inputs()
    with pytest.raises(gradctl.UsageError, match="sides is 'two' or 'one', got 'both'"):
        gradctl.gradient_penalty(model(x), x, sides="both")  # type: ignore[arg-type]
    with pytest.raises(gradctl.UsageError, match="reduction is"):
        gradctl.gradient_penalty(model(x), x, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(gradctl.UsageError, match=r"target is a norm, got -1\.0"):
        gradctl.gradient_penalty(model(x), x, target=-1.0)
