"""Finite differences: slopes with error bars, and which tensors of a function disagree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradctl
from gradctl._finite_difference import compare_function, mismatches
from gradctl._finite_difference._double import with_casts_raised
from gradctl._finite_difference._point import Point, Subject, difference
from gradctl._finite_difference._slope import DOUBLE, SINGLE, answer, climb
from gradctl._finite_difference._state import RandomStates
from gradctl._finite_difference._trees import replaced, tensors


@given(st.floats(-3, 3), st.sampled_from([math.sin, math.exp, math.atan, lambda t: t * t * t]))
def test_the_error_bar_of_a_slope_holds_the_derivative(x: float, fn: Callable[[float], float]) -> None:
    ladder = climb(lambda t: fn(x + t) - fn(x), DOUBLE)
    a, b = torch.tensor(x, dtype=torch.float64, requires_grad=True), {math.sin: torch.sin, math.exp: torch.exp}
    whole = {**b, math.atan: torch.atan}.get(fn, lambda t: t * t * t)(a)
    whole.backward()
    best = ladder.best
    assert best is not None
    assert a.grad is not None
    assert abs(best.value - a.grad.item()) <= 8 * best.error + 1e-15
    assert best.error <= 1e-7 * max(1.0, abs(best.value))


def test_a_wrong_slope_differs_a_right_one_agrees_and_noise_decides_nothing() -> None:
    ladder = climb(math.sin, DOUBLE)
    assert answer(1.0, 1.0, ladder, DOUBLE)[0] == "agrees"
    assert answer(1.0 + 1e-4, 1.0, ladder, DOUBLE)[0] == "differs"
    noise = iter(torch.randn(10_000, generator=torch.Generator().manual_seed(0)).tolist())
    noisy = climb(lambda t: t + 1e-3 * next(noise), DOUBLE)
    assert noisy.noise > 1e-4
    assert answer(1.01, 1.0, noisy, DOUBLE)[0] == "unknown"


def test_a_slope_of_straight_pieces_agrees_with_the_piece_at_the_point() -> None:
    # Steep within 1e-5 of the point, flat outside: both are slopes, at different steps.
    ladder = climb(lambda t: 5 * max(-1e-5, min(t, 1e-5)) + t, DOUBLE)
    assert answer(6.0, 6.0, ladder, DOUBLE)[0] == "agrees"
    assert answer(3.0, 3.0, ladder, DOUBLE)[0] == "differs"


def test_the_steps_of_float32_are_longer_than_those_of_float64() -> None:
    assert min(SINGLE.ladder) > max(DOUBLE.tried)
    assert sorted(DOUBLE.ladder, reverse=True) == list(DOUBLE.ladder)


@given(st.lists(st.integers(1, 5), max_size=3), st.booleans(), st.integers(0, 1000))
def test_directions_are_repeatable_and_have_no_element_near_zero(shape: list[int], complexes: bool, seed: int) -> None:
    value = torch.full(shape, 2.0, dtype=torch.complex128 if complexes else torch.float64)
    subject = Subject(run=lambda leaves: [leaves[0].abs().sum()], names=("x",), values=(value,))
    with RandomStates() as states:
        point, again = Point(subject, states, seed), Point(subject, states, seed)
    drawn = point.direction(0, 0)
    assert torch.equal(drawn, again.direction(0, 0))
    parts = torch.view_as_real(drawn) if complexes else drawn
    scale = 2.0 / (math.sqrt(2) if complexes else 1.0)
    assert ((parts.abs() >= 0.49 * scale) & (parts.abs() <= 1.51 * 2.0)).all()
    if value.numel() > 1:
        assert not torch.equal(drawn, point.direction(1, 0))


def test_mismatches_names_the_inputs_that_are_wrong_and_says_it_in_words() -> None:
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a * b.exp()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return g * b.exp(), g * a * b.exp() / 2

    torch.manual_seed(0)
    (found,) = mismatches(lambda a, b: Times.apply(a, b), (torch.randn(5), torch.randn(5)), names=["a", "b"])
    assert found.name == "b"
    assert found.factor == pytest.approx(2)
    assert found.relative > 0.01
    assert str(found).startswith("the gradient of b gives ")
    after = torch.get_rng_state()
    assert mismatches(lambda a: a.sin() * torch.rand(3), (torch.randn(3, generator=torch.Generator()),)) == []
    assert torch.equal(after, torch.get_rng_state())


def test_mismatches_of_the_second_order_name_inputs_and_cotangents() -> None:
    comparison = compare_function(lambda x: x.sin(), (torch.randn(3),), {}, ["x"], order=2)
    assert comparison.mismatches == ()
    assert comparison.checked == ("x", "grad_outputs[0]")


def test_mismatches_refuses_inputs_without_a_derivative() -> None:
    with pytest.raises(gradctl.UsageError, match="no input has a derivative") as raised:
        mismatches(lambda x: x, (torch.arange(3),), names=["index"])
    assert "index (int64)" in str(raised.value)


def test_a_healthy_comparison_runs_few_forwards_and_no_more_backwards_than_it_needs() -> None:
    torch.manual_seed(0)
    comparison = compare_function(lambda x: x.sin().sum(), (torch.randn(50),), {}, ["x"], probes=3)
    assert (comparison.num_forwards, comparison.num_backwards) == (7, 2)


def test_difference_is_zero_only_for_equal_bits() -> None:
    a = torch.tensor([1.0, math.nan, -0.0], dtype=torch.float64)
    assert difference(a, a.clone()) == 0.0
    assert difference(a[:1], a[:1] * (1 + 2**-52)) > 0
    assert difference(a[:1], a[1:2]) == math.inf
    assert difference(a, a[:2]) == math.inf


def test_nested_values_are_named_and_rebuilt() -> None:
    x, y = torch.ones(1), torch.ones(2)
    value = {"a": [x, 3], "b": (y, {"c": None})}
    assert [name for name, _ in tensors(value, "v")] == ["v['a'][0]", "v['b'][0]"]
    built = replaced(value, lambda name, tensor: tensor * 2, "v")
    assert built["b"][1] == {"c": None}
    assert torch.equal(built["a"][0], 2 * x)
    assert replaced(value, lambda name, tensor: tensor, "v") is value


def test_casts_are_raised_in_the_forward_only() -> None:
    seen: list[torch.dtype] = []

    class Rounds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.float() * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            seen.append((2 * g).float().dtype)
            return 2 * g

    subject = Subject(run=lambda leaves: [Rounds.apply(leaves[0])], names=("x",), values=(torch.ones(2).double(),))
    leaf = subject.values[0].clone().requires_grad_()
    (out,) = with_casts_raised(subject).run([leaf])
    assert out.dtype == torch.float64
    out.sum().backward()
    assert seen == [torch.float32]
