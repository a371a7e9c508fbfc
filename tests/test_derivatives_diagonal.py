"""hessian_diagonal: exact, by propagation where the graph allows it and by products anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl
from derivative_nets import F64, build, dense_hessian, flat

CE = nn.functional.cross_entropy
ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU]


class Residual(nn.Module):
    """Skip connections and a scaled branch: a graph that is no chain."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.activation(self.a(x))
        return self.c(x - 0.5 * self.activation(self.b(x)))


def network(kind: str, activation: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "cnn":
        parts = (nn.Conv2d(1, 2, 3, stride=2, padding=1), activation, nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), activation)
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(3, 3, bias=False)).double(), torch.randn(
            5, 1, 8, 8, dtype=F64
        )
    if kind == "residual":
        return Residual(activation).double(), torch.randn(5, 4, dtype=F64)
    parts = (nn.Linear(4, 5), activation, nn.Dropout(0.0), nn.Linear(5, 4), activation, nn.Linear(4, 3))
    return nn.Sequential(*parts).double(), torch.randn(5, 4, dtype=F64)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.__name__)
def test_propagation_gives_the_diagonal_of_the_dense_hessian(kind: str, activation: Any) -> None:
    model, x = network(kind, activation())
    y, weight = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    for loss in (
        lambda: CE(model(x), y, weight=weight),
        lambda: nn.functional.mse_loss(model(x), torch.ones(5, 3, dtype=F64)),
        lambda: nn.functional.binary_cross_entropy_with_logits(model(x), torch.ones(5, 3, dtype=F64), reduction="sum"),
    ):
        wanted = dense_hessian(model, loss).diagonal()
        assert float((flat(gradctl.hessian_diagonal(loss, model, method="propagation")) - wanted).abs().max()) < 1e-13
        assert float((flat(gradctl.hessian_diagonal(loss(), model)) - wanted).abs().max()) < 1e-13


@pytest.mark.parametrize("method", ["auto", "products", "products-loop"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm"])
def test_products_give_the_diagonal_of_the_dense_hessian(kind: str, method: Any) -> None:
    model, loss = build(kind)
    found = flat(gradctl.hessian_diagonal(loss, model, method=method))
    assert float((found - dense_hessian(model, loss).diagonal()).abs().max()) < 1e-12


def test_attention_is_done_by_products_with_the_math_backend() -> None:
    model, loss = build("transformer")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = dense_hessian(model, loss).diagonal()
    assert torch.allclose(flat(gradctl.hessian_diagonal(loss, model)), wanted, atol=1e-12)


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(2, 4), st.sampled_from([torch.tanh, torch.relu, torch.sigmoid])
)
@settings(max_examples=25)
def test_for_any_shapes_propagation_and_products_agree(b: int, width: int, out: int, activation: Any) -> None:
    torch.manual_seed(b * 25 + width * 5 + out)
    first, last, x = nn.Linear(3, width).double(), nn.Linear(width, out).double(), torch.randn(b, 3, dtype=F64)
    y = torch.randint(0, out, (b,))
    params = [*first.parameters(), *last.parameters()]
    loss = CE(last(activation(first(x))), y)
    by_hand = gradctl.hessian_diagonal(loss, params, method="products-loop")
    for one, other in zip(gradctl.hessian_diagonal(loss, params, method="propagation"), by_hand, strict=True):
        assert float((one - other).abs().max()) < 1e-13


def tied(w: nn.Linear, x: Tensor) -> Tensor:
    return w(torch.relu(w(x)))


def mixed(w: nn.Linear, x: Tensor) -> Tensor:
    z = w(x)
    return z - z.mean(0, keepdim=True)


def gated(w: nn.Linear, x: Tensor) -> Tensor:
    z = w(x)
    return z * z.relu()


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (tied, "is used more than once"),
        (mixed, "has not the batch of 4 in its first dim"),
        (gated, "no rule for MulBackward0"),
        (lambda w, x: 1.0 + w(x).exp(), "no rule for ExpBackward0"),
        (lambda w, x: torch.ones(4, 3, dtype=F64).div(w(x)), "no rule for a division by a computed value"),
        (lambda w, x: w(x) + w.bias, "enters as no weight or bias of a layer|over the batch"),
        (lambda w, x: x @ w.weight, "not a transposed weight"),
        (lambda w, x: torch.nn.functional.linear(x, w.weight * 2), "a weight that is itself computed"),
        (lambda w, x: w(x)[[1, 0, 2, 3]], "no rule for IndexBackward0"),
        (lambda w, x: torch.cat([w(x), w(x)[:, :1]], 1) - w(x).mean(1), "no rule|more than once|over the batch"),
    ],
)
def test_what_propagation_has_no_rule_for_is_named_and_done_by_products(outputs: Any, reason: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=F64)
    params = [layer.weight] if "transposed" in reason or "itself" in reason else list(layer.parameters())
    loss = lambda: CE(outputs(layer, x), torch.tensor([0, 1, 2, 0]))  # noqa: E731
    with pytest.raises(gradctl.UsageError, match=f"the diagonal cannot be propagated: .*({reason})"):
        gradctl.hessian_diagonal(loss, params, method="propagation")
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), params, create_graph=True)])
    wanted = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(each, params, retain_graph=True)])[number]
        for number, each in enumerate(gradient)
    ]
    found = torch.cat([each.reshape(-1) for each in gradctl.hessian_diagonal(loss, params)])
    assert torch.allclose(found, torch.stack(wanted).detach(), atol=1e-12)


def test_a_softmax_over_the_batch_is_not_propagated() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=F64)
    loss = lambda: -layer(x).log_softmax(0)[0].sum()  # noqa: E731
    with pytest.raises(gradctl.UsageError, match="a softmax over another dim"):
        gradctl.hessian_diagonal(loss, layer, method="propagation")
    assert torch.allclose(
        flat(gradctl.hessian_diagonal(loss, layer)), dense_hessian(layer, loss).diagonal(), atol=1e-12
    )


def test_batchnorm_is_done_by_products_in_training_and_propagated_when_frozen_in_evaluation() -> None:
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double(),
        torch.randn(6, 3, dtype=F64),
    )
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    loss = lambda: CE(model(x), y)  # noqa: E731
    assert torch.allclose(
        flat(gradctl.hessian_diagonal(loss, model)), dense_hessian(model, loss).diagonal(), atol=1e-11
    )
    model.eval()
    model[1].requires_grad_(False)
    found = flat(gradctl.hessian_diagonal(loss, model, method="propagation"))
    assert torch.allclose(found, dense_hessian(model, loss).diagonal(), atol=1e-13)


def test_unused_parameters_have_zeros_and_a_penalty_is_counted() -> None:
    w, idle = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    found = gradctl.hessian_diagonal(w.pow(3).sum(), {"w": w, "idle": idle})
    assert found["w"].tolist() == [6.0, 6.0]
    assert found["idle"].tolist() == [0.0]
    with pytest.raises(gradctl.UsageError, match="the loss does not depend on idle"):
        gradctl.hessian_diagonal(w.pow(3).sum(), {"w": w, "idle": idle}, unused="error")


def test_a_random_estimate_is_off_by_more_than_the_diagonal_itself_where_the_exact_one_is_exact() -> None:
    model, loss = build("mlp")
    dense = dense_hessian(model, loss)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (10, len(dense)), generator=generator).double() * 2 - 1
    hutchinson = (signs * (signs @ dense)).mean(0)
    exact = flat(gradctl.hessian_diagonal(loss, model))
    assert float((hutchinson - dense.diagonal()).norm() / dense.diagonal().norm()) > 1.0
    assert float((exact - dense.diagonal()).norm() / dense.diagonal().norm()) < 1e-12
