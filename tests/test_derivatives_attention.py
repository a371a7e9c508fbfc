"""Second derivatives through attention: the fused kernels have none, the math backend has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl
from derivative_nets import F64, directions, gradient_differences, worst

CALLS: dict[str, Any] = {
    "hvp": lambda loss, model, v: gradctl.hvp(loss, model, v),
    "ggnvp": lambda loss, model, v: gradctl.ggnvp(loss, model, v),
    "HessianOperator": lambda loss, model, v: gradctl.HessianOperator(loss, model)(v),
    "GGNOperator": lambda loss, model, v: gradctl.GGNOperator(loss, model)(v),
    "sharpness": lambda loss, model, v: gradctl.sharpness(loss, model),
    "hessian_diagonal": lambda loss, model, v: gradctl.hessian_diagonal(loss, model),
}


class Direct(nn.Module):
    """Calls the attention of torch itself, causal or with a mask."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.project, self.causal = nn.Linear(8, 24), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mask = None if self.causal else torch.ones(5, 5, dtype=torch.bool).tril()
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal).flatten(1)


def build(kind: str) -> Any:
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, 8, dtype=F64), torch.tensor([0, 1, 0])
    if kind == "encoder layer":
        model: nn.Module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    elif kind == "multihead":
        attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
        model = attention
    else:
        model = Direct(causal=kind == "causal").double()

    def outputs() -> Tensor:
        found = model(x, x, x, need_weights=False)[0] if kind == "multihead" else model(x)
        return found.flatten(1)[:, :2].contiguous()

    return model, lambda: nn.functional.cross_entropy(outputs(), y)


@pytest.mark.parametrize("kind", ["encoder layer", "multihead", "causal", "masked"])
def test_hvp_through_attention_is_the_difference_of_gradients(kind: str) -> None:
    model, loss = build(kind)
    v = directions(model)
    assert worst(gradctl.hvp(loss, model, v), gradient_differences(model, loss, v)) < 1e-6


@pytest.mark.parametrize("kind", ["encoder layer", "multihead", "causal", "masked"])
def test_gauss_newton_products_through_attention_agree_whatever_the_method(kind: str) -> None:
    model, loss = build(kind)
    v = directions(model)
    assert worst(gradctl.ggnvp(loss, model, v), gradctl.ggnvp(loss, model, v, method="double-vjp")) < 1e-12


@pytest.mark.parametrize("call", sorted(CALLS))
def test_every_call_refuses_a_loss_through_a_fused_kernel_and_takes_the_function(call: str) -> None:
    model, loss = build("causal")
    with pytest.raises(gradctl.NoSecondDerivative, match="ScaledDotProductFlashAttentionForCpu") as told:
        CALLS[call](loss(), model, directions(model))
    assert "pass a function that computes the loss" in str(told.value)
    CALLS[call](loss, model, directions(model))


def test_a_loss_computed_under_the_math_backend_is_taken() -> None:
    model, loss = build("encoder layer")
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        value = loss()
    v = directions(model)
    assert worst(gradctl.hvp(value, model, v), gradctl.hvp(loss, model, v)) == 0


def test_the_choice_of_a_backend_outside_is_left_as_it_was() -> None:
    model, loss = build("causal")
    gradctl.hvp(loss, model, directions(model))
    assert loss().grad_fn is not None
    with pytest.raises(gradctl.NoSecondDerivative):
        gradctl.hvp(loss(), model, directions(model))


def test_jacobians_by_rows_keep_the_fused_kernel() -> None:
    model, _ = build("causal")
    x = torch.randn(3, 5, 8, dtype=F64)
    found = gradctl.jacobian(model, x, batch="samples")
    alone = x[:1].clone().requires_grad_()
    row = torch.autograd.grad(model(alone)[0, 7], alone)[0]
    assert torch.allclose(found[0, 7], row[0], atol=1e-12)
