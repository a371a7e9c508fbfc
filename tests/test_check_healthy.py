"""Right gradients are called right: forty-six modules and functions, drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradctl
from check_modules import CASES, drawn

SEEDS = st.integers(0, 2**31 - 1)


def found(name: str, seed: int) -> gradctl.Findings:
    fn, inputs = drawn(name, seed)
    return gradctl.check(fn, inputs, seed=seed, expected=["x"] if name == "straight_through" else ())


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_right_module_gives_no_finding(name: str) -> None:
    assert found(name, 0) == []


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(CASES)), seed=SEEDS)
def test_right_modules_drawn_at_random_give_no_finding(name: str, seed: int) -> None:
    assert found(name, seed) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=1000)
@given(name=st.sampled_from(sorted(CASES)), seed=SEEDS)
def test_a_thousand_right_modules_give_no_finding(name: str, seed: int) -> None:
    assert found(name, seed) == []


@pytest.mark.parametrize("name", ["relu_at_zero", "max_pool_of_integers"])
def test_a_kink_is_a_remark_and_on_request_a_note(name: str) -> None:
    fn, inputs = drawn(name, 0)
    silent = gradctl.check(fn, inputs)
    assert silent == []
    assert any("is at a kink" in remark for remark in silent.remarks)
    (note,) = gradctl.check(fn, inputs, notes=True)
    assert (note.slug, note.severity) == ("kink", "note")


def test_a_smooth_function_made_of_kinks_is_a_kink_where_autograd_chooses_wrongly() -> None:
    x = torch.tensor([0.0, 1.0])
    # relu(x) - relu(-x) is x: smooth, but autograd gives 0 at zero; right beside it the gradient is right.
    assert [f.slug for f in gradctl.check(lambda x: x.relu() - (-x).relu(), x, notes=True)] == ["kink"]


def test_casts_to_float32_inside_of_a_function_go_to_float64() -> None:
    torch.manual_seed(0)
    for cast in (lambda x: x.float(), lambda x: x.to(torch.float32), lambda x: x.softmax(0, dtype=torch.float32)):
        findings = gradctl.check(lambda x, cast=cast: (cast(x) ** 3).sin(), torch.randn(50))
        assert findings == []
        assert findings.remarks == ("casts to float32 went to float64 in this check",)


def test_half_precision_inside_of_a_function_is_remarked_and_no_alarm() -> None:
    torch.manual_seed(0)
    findings = gradctl.check(lambda x: (x.bfloat16() ** 3).sin().to(x.dtype), torch.randn(50))
    assert findings == []
    assert any("rounds to bfloat16" in remark for remark in findings.remarks)


def test_sums_in_another_order_are_no_non_determinism() -> None:
    calls = [0]

    def fn(x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        order = torch.arange(1000) if calls[0] % 2 else torch.arange(999, -1, -1)
        return x[order].exp().cumsum(0)[-1]

    torch.manual_seed(0)
    assert gradctl.check(fn, torch.randn(1000)) == []


def test_an_expanded_input_is_right() -> None:
    assert gradctl.check(lambda x: x.sin() * torch.arange(4.0), torch.randn(1).expand(4)) == []


def test_a_function_that_uses_nothing_of_an_input_is_right() -> None:
    assert gradctl.check(lambda x, y: x * 2, (torch.randn(3), torch.randn(3))) == []


@pytest.mark.parametrize("shift", [1e6, 1e10])
def test_a_large_constant_that_swallows_small_steps_is_no_alarm(shift: float) -> None:
    torch.manual_seed(0)
    assert gradctl.check(lambda x: (shift + x).sum(), torch.randn(5)) == []
    assert gradctl.check(lambda x: ((shift + x) - shift).sin(), torch.randn(5)) == []
