"""`gradctl.check(..., order=2)`: the gradient of the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradctl
from check_modules import CASES, drawn

# Without a double backward in torch, and with one that is wrong (the fused weight norm, embeddings with padding).
NOT_TWICE = {"sparse_embedding_bag", "ctc", "distances"}
WRONG_IN_TORCH = {"weight_norm", "embedding_with_padding"}


@pytest.mark.parametrize("name", sorted(set(CASES) - NOT_TWICE - WRONG_IN_TORCH))
def test_the_double_backward_of_a_right_module_is_right(name: str) -> None:
    fn, inputs = drawn(name, 1)
    assert gradctl.check(fn, inputs, order=2, expected=["x"] if name == "straight_through" else ()) == []


@pytest.mark.parametrize("name", sorted(NOT_TWICE))
def test_an_operation_without_a_double_backward_is_refused_by_name(name: str) -> None:
    fn, inputs = drawn(name, 1)
    with pytest.raises(gradctl.NoSecondDerivative, match=r"_backward has no second derivative"):
        gradctl.check(fn, inputs, order=2)


class SavedIntermediate(torch.autograd.Function):
    """x·eˣ, with eˣ kept from the forward: the second derivative loses a term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.exp()
        ctx.save_for_backward(x, e)
        return x * e

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, e = ctx.saved_tensors
        return g * (e + x * e)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos()


def test_an_intermediate_that_a_function_saved_is_found_by_order_two_and_only_by_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(5)
    assert gradctl.check(lambda x: SavedIntermediate.apply(x), x) == []
    (finding,) = gradctl.check(lambda x: SavedIntermediate.apply(x), x, order=2)
    assert (finding.slug, finding.severity, finding.parameters) == ("missing-term", "error", ("x",))
    assert "second derivative of x" in finding.symptom
    assert "saved intermediate" in finding.why


def test_a_function_that_is_differentiable_once_is_found_or_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(5)
    assert gradctl.check(lambda x: Once.apply(x), x) == []
    try:
        findings = gradctl.check(lambda x: Once.apply(x) * x, x, order=2)
    except gradctl.NoSecondDerivative:
        return
    assert "x" in {name for finding in findings for name in finding.parameters}


def test_the_double_backward_of_an_embedding_with_padding_names_the_weight_and_its_padding_row() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2))
    words = torch.tensor([[0, 2], [4, 0]])
    assert gradctl.check(model, words) == []
    (finding,) = gradctl.check(model, words, order=2)
    assert finding.parameters == ("0.weight",)
    assert "[0, 0], [0, 1], [0, 2]" in finding.symptom
    assert "padding row" in finding.why


def test_the_fused_weight_norm_of_torch_is_judged_as_gradgradcheck_judges_it() -> None:
    torch.manual_seed(0)
    v, g = torch.randn(3, 4).double(), torch.rand(3, 1).double() + 1
    right = torch.autograd.gradgradcheck(
        lambda v, g: torch._weight_norm(v, g, 0),
        (v.requires_grad_(), g.requires_grad_()),
        raise_exception=False,
    )
    findings = gradctl.check(lambda v, g: torch._weight_norm(v, g, 0), (v, g), order=2)
    assert (findings == []) == right
    assert gradctl.check(lambda v, g: v * (g / v.norm(dim=1, keepdim=True)), (v, g), order=2) == []


def test_attention_is_differentiated_twice_by_the_backend_that_can() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 4, 4)
    assert gradctl.check(lambda q: F.scaled_dot_product_attention(q, q, q), q, order=2) == []


def test_a_factor_in_the_double_backward_alone_is_found() -> None:
    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
            ctx.save_for_backward(x, g)
            return 3 * x * x * g

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
            x, g = ctx.saved_tensors
            return 2 * 6 * x * g * u, 3 * x * x * u

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return Inner.apply(ctx.saved_tensors[0], g)

    torch.manual_seed(0)
    x = torch.randn(4)
    assert gradctl.check(lambda x: Cube.apply(x), x) == []
    (finding,) = gradctl.check(lambda x: Cube.apply(x), x, order=2)
    assert (finding.slug, finding.parameters) == ("factor", ("x",))
