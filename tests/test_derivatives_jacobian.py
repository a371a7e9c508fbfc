"""jacobian: rows or columns, the whole or one a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl
from derivative_nets import F64, build

METHODS = ["auto", "rows", "rows-loop", "columns", "columns-loop"]


def by_hand(output: Tensor, x: Tensor) -> Tensor:
    """Return the Jacobian by one plain backward a row."""
    rows = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in output.reshape(-1)]
    return torch.stack(rows).view(*output.shape, *x.shape)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_rows_of_plain_backwards(method: Any) -> None:
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    weight = torch.randn(4, 2, dtype=F64)
    output = (x @ weight).tanh() * x.sum()
    assert torch.allclose(gradctl.jacobian(output, x, method=method), by_hand(output, x), atol=1e-14)
    found = gradctl.jacobian(lambda z: (z @ weight).tanh() * z.sum(), x.detach(), method=method)
    assert torch.allclose(found, by_hand(output, x), atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm"])
def test_the_jacobians_of_samples_are_those_of_each_sample_alone(kind: str, method: Any) -> None:
    model, loss = build(kind)
    x = next(
        c.cell_contents
        for c in loss.__closure__ or ()
        if isinstance(c.cell_contents, Tensor) and c.cell_contents.is_floating_point()
    )
    found = gradctl.jacobian(model, x, batch="samples", method=method)
    for number in range(len(x)):
        alone = x[number : number + 1].clone().requires_grad_()
        assert torch.allclose(found[number], by_hand(model(alone), alone)[0, :, 0], atol=1e-12)


def test_parameters_by_name_give_jacobians_by_name() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=F64)
    found = gradctl.jacobian(lambda: model(x), model)
    assert {name: list(value.shape) for name, value in found.items()} == {"weight": [4, 2, 2, 3], "bias": [4, 2, 2]}
    assert torch.allclose(found["weight"], torch.einsum("bi,oq->boqi", x, torch.eye(2, dtype=F64)))


def test_several_outputs_and_inputs_nest_as_they_were_given() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    found = gradctl.jacobian(lambda p, q: {"product": p * q, "p": p}, [a, b])
    assert found["product"][1].tolist() == [[1.0], [2.0]]
    assert found["p"][0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert found["p"][1].tolist() == [[0.0], [0.0]]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=25)
def test_for_any_shape_auto_is_right(n: int, m: int, b: int) -> None:
    torch.manual_seed(n * 100 + m * 10 + b)
    x, weight = torch.randn(b, n, dtype=F64, requires_grad=True), torch.randn(n, m, dtype=F64)
    output = (x @ weight).sin()
    whole = by_hand(output, x)
    assert torch.allclose(gradctl.jacobian(output, x), whole, atol=1e-13)
    each = torch.stack([whole[number, :, number] for number in range(b)])
    assert torch.allclose(gradctl.jacobian(output, x, batch="samples"), each, atol=1e-13)


def test_few_inputs_are_moved_and_few_outputs_are_differentiated() -> None:
    x, weight = torch.randn(2, requires_grad=True), torch.randn(2, 50)
    wide = gradctl.JacobianOperator((x @ weight).sin(), x)
    wide.dense()
    assert wide.dense_method == "columns"
    narrow = gradctl.JacobianOperator((x @ weight).sin().sum(), x)
    narrow.dense()
    assert narrow.dense_method == "rows"


class NoRule(torch.autograd.Function):
    """Its backward asks for a number, which a batch of gradients does not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * round(2.0 + 0.0 * grad.sum().item())


def test_an_operation_without_a_batching_rule_is_differentiated_row_by_row() -> None:
    x = torch.randn(3, requires_grad=True)
    operator = gradctl.JacobianOperator(NoRule.apply(x), x)
    assert torch.equal(operator.dense(), 2 * torch.eye(3))
    assert operator.dense_method == "rows-loop"
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        operator.dense(method="rows")


def test_batchnorm_in_training_mode_has_no_jacobian_of_a_sample() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(5, 3)
    with pytest.raises(gradctl.NotPerSample, match="the output of sample 0 depends on other samples of inputs") as told:
        gradctl.jacobian(model, x, batch="samples")
    assert "BatchNorm in training mode" in str(told.value)
    assert gradctl.jacobian(model, x).shape == (5, 3, 5, 3)
    assert gradctl.jacobian(model.eval(), x, batch="samples").shape == (5, 3, 3)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda z: z.mean(0),
        lambda z: z - z.mean(1),
        lambda z: z - z.mean(0, keepdim=True),
        lambda z: z.t() * 2,
        lambda z: z[[1, 0, 2]],
        lambda z: z @ z.detach() @ z,
        lambda z: (z @ torch.ones(3, 3)).relu().flip(0),
        lambda z: torch.nn.functional.linear(torch.ones(3, 3), z),
    ],
)
def test_samples_that_see_each_other_are_found_when_batch_and_features_have_one_size(mixing: Any) -> None:
    x = torch.rand(3, 3) + 0.1
    with pytest.raises(gradctl.NotPerSample, match="the output of sample 0 depends on other samples"):
        gradctl.jacobian(mixing, x, batch="samples")


def test_samples_need_one_first_dim() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(gradctl.UsageError, match="have not one first dim in common"):
        gradctl.jacobian(lambda z: z.sum(0), x, batch="samples")


def test_outputs_that_depend_on_nothing_are_refused() -> None:
    x, other = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    with pytest.raises(gradctl.UsageError, match="the output does not depend on inputs"):
        gradctl.jacobian(x * 2, other)
    with pytest.raises(gradctl.UsageError, match="the output has no history"):
        gradctl.jacobian(lambda z: torch.ones(2), other)


def test_a_graph_that_is_passed_is_kept() -> None:
    x = torch.randn(3, requires_grad=True)
    output = x.sin()
    gradctl.jacobian(output, x)
    output.sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
