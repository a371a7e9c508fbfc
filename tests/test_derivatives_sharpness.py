"""sharpness: the largest eigenvalue, with a bar that holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl
from derivative_nets import F64, build, dense_hessian


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-4])
def test_the_largest_eigenvalue_lies_within_the_bar(kind: str, rtol: float) -> None:
    model, loss = build(kind)
    values = torch.linalg.eigvalsh(dense_hessian(model, loss))
    found = gradctl.sharpness(loss, model, rtol=rtol)
    assert found.residual <= rtol * found.value
    assert abs(found.value - float(values[-1])) <= found.residual
    assert found.value <= float(values[-1]) * (1 + 1e-9)
    assert found.smallest >= float(values[0]) - 1e-9
    assert found.num_products < 30


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 1000))
@settings(max_examples=50)
def test_for_any_spectrum_an_eigenvalue_lies_within_the_bar(spectrum: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=F64))
    values = torch.tensor(spectrum, dtype=F64)
    matrix = basis @ torch.diag(values) @ basis.T
    w = torch.randn(len(spectrum), generator=generator, dtype=F64, requires_grad=True)
    found = gradctl.sharpness(lambda: 0.5 * w @ matrix @ w, w, seed=seed)
    assert float((values - found.value).abs().min()) <= found.residual + 1e-9
    assert found.value <= float(values.max()) + 1e-9


def test_when_products_run_out_the_bar_says_how_far_it_came() -> None:
    model, loss = build("mlp")
    found = gradctl.sharpness(loss, model, rtol=1e-12, max_products=3)
    assert found.num_products == 3
    top = float(torch.linalg.eigvalsh(dense_hessian(model, loss))[-1])
    assert found.residual > 1e-3
    assert abs(found.value - top) <= found.residual


def test_a_quadratic_diverges_above_two_over_the_sharpness_and_falls_below() -> None:
    scales = torch.tensor([10.0, 3.0, 1.0], dtype=F64)
    w = torch.ones(3, dtype=F64, requires_grad=True)
    top = gradctl.sharpness(lambda: 0.5 * (scales * w * w).sum(), w, rtol=1e-8).value
    assert top == pytest.approx(10.0)
    for factor, falls in ((0.99, True), (1.01, False)):
        at = torch.ones(3, dtype=F64)
        for _ in range(500):
            at = at - factor * 2 / top * scales * at
        assert (float(at.norm()) < 1.0) is falls


def test_the_random_state_of_the_program_is_left_alone_and_a_seed_repeats() -> None:
    model, loss = build("mlp")
    before = torch.get_rng_state()
    first = gradctl.sharpness(loss, model, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert gradctl.sharpness(loss, model, seed=3) == first


def test_float32_reaches_its_bar_and_the_text_shows_it() -> None:
    model, loss = build("mlp", torch.float32)
    found = gradctl.sharpness(loss, model)
    wide = build("mlp")
    top = float(torch.linalg.eigvalsh(dense_hessian(*wide))[-1])
    assert abs(found.value - top) <= found.residual + 1e-5
    assert f"after {found.num_products} products" in str(found)


def test_a_flat_loss_has_sharpness_zero() -> None:
    w = torch.ones(3, requires_grad=True)
    found = gradctl.sharpness(lambda: (2 * w).sum(), w)
    assert found.value == 0.0
    assert found.num_products == 1


@pytest.mark.parametrize(("rtol", "most"), [(0.0, 10), (-1.0, 10), (1e-2, 0)])
def test_a_tolerance_or_a_number_of_products_that_is_not_positive_is_refused(rtol: float, most: int) -> None:
    model, loss = build("mlp")
    with pytest.raises(gradctl.UsageError, match=f"rtol is {rtol}, max_products {most}"):
        gradctl.sharpness(loss, model, rtol=rtol, max_products=most)


def test_a_product_that_is_not_finite_is_refused() -> None:
    w = torch.zeros(2, requires_grad=True)
    with pytest.raises(gradctl.NonFiniteGradient, match="a Hessian-vector product is not finite"):
        gradctl.sharpness(lambda: w.sqrt().sum(), w)


def test_the_sharpness_of_attention_is_that_of_the_math_backend() -> None:
    model, loss = build("transformer")

    def plain() -> Tensor:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return loss()

    top = float(torch.linalg.eigvalsh(dense_hessian(model, plain))[-1])
    found = gradctl.sharpness(loss, model, rtol=1e-3)
    assert abs(found.value - top) <= found.residual
