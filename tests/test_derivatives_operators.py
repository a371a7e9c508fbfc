"""Operators: one graph, many products, and SciPy's interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as sparse
import torch
from torch import Tensor, nn

import gradctl
from derivative_nets import F64, build, dense_hessian, directions, flat, worst

OPERATORS = [gradctl.HessianOperator, gradctl.GGNOperator]


def jacobian_operator() -> tuple[Any, Tensor]:
    """Return the operator of a small network in its parameters, and its dense Jacobian."""
    model, x = build("mlp")[0], torch.randn(3, 5, dtype=F64)
    dense = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(each, list(model.parameters()), retain_graph=True)])
            for each in model(x).reshape(-1)
        ]
    )
    return gradctl.JacobianOperator(lambda: model(x), model), dense


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer", "lstm"])
def test_every_further_product_is_the_first_one_again(kind: str) -> None:
    model, loss = build(kind)
    hessian, ggn = gradctl.HessianOperator(loss, model), gradctl.GGNOperator(loss, model)
    for seed in range(3):
        v = directions(model, seed)
        assert worst(hessian(v), gradctl.hvp(loss, model, v)) == 0
        assert worst(ggn(v), gradctl.ggnvp(loss, model, v)) < 1e-13


def test_the_function_runs_once_and_products_run_no_forward() -> None:
    model, loss = build("mlp")
    calls: list[int] = []

    def counted() -> Tensor:
        calls.append(1)
        return loss()

    for operator in (gradctl.HessianOperator(counted, model), gradctl.GGNOperator(counted, model)):
        for _ in range(3):
            operator(directions(model))
    assert len(calls) == 2


def test_the_operator_knows_the_loss_and_the_gradient_of_its_place() -> None:
    model, loss = build("mlp")
    operator = gradctl.HessianOperator(loss, model)
    assert operator.loss == loss()
    wanted = torch.autograd.grad(loss(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(operator.gradient.values(), wanted, strict=True))


def test_matmat_and_matmul_with_the_identity_give_the_dense_hessian() -> None:
    model, loss = build("mlp")
    operator, dense = gradctl.HessianOperator(loss, model), dense_hessian(*build("mlp"))
    eye = torch.eye(operator.shape[0], dtype=F64)
    assert torch.allclose(operator @ eye, dense, atol=1e-14)
    assert np.allclose(operator.matmat(eye.numpy()), dense, atol=1e-14)
    assert np.allclose(operator.rmatmat(eye.numpy()), dense.T, atol=1e-14)
    assert operator.matmat(eye[:, :0]).shape == (len(eye), 0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_scipy_takes_an_operator_as_it_is(operator: Any) -> None:
    model, loss = build("mlp")
    found = operator(loss, model)
    assert found.shape == (79, 79)
    assert found.dtype == np.float64
    dense = np.stack([found.matvec(unit) for unit in np.eye(79)], 1)
    assert np.allclose(dense, dense.T, atol=1e-13)
    top = sparse.eigsh(found, k=1, which="LA", return_eigenvectors=False)[0]
    assert top == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-9)


def test_conjugate_gradients_solve_with_a_damped_gauss_newton_matrix() -> None:
    model, loss = build("mlp")
    ggn = gradctl.GGNOperator(loss, model)
    right = flat(gradctl.HessianOperator(loss, model).gradient).numpy()
    damped = sparse.LinearOperator(ggn.shape, matvec=lambda v: ggn.matvec(v) + 0.1 * v, dtype=ggn.dtype)
    solution, info = sparse.cg(damped, right, rtol=1e-10)
    assert info == 0
    assert np.allclose(ggn @ solution + 0.1 * solution, right, atol=1e-8)


def test_a_jacobian_operator_multiplies_in_both_directions() -> None:
    operator, dense = jacobian_operator()
    assert operator.shape == tuple(dense.shape)
    v, u = torch.randn(dense.shape[1], dtype=F64), torch.randn(dense.shape[0], dtype=F64)
    assert torch.allclose(operator.matvec(v), dense @ v)
    assert torch.allclose(operator.rmatvec(u), dense.T @ u)
    assert torch.allclose(operator.transposed(u.view(3, 3))["0.weight"].reshape(-1), (dense.T @ u)[:30])
    assert torch.allclose(operator @ v[:, None], (dense @ v)[:, None])
    top = sparse.svds(operator, k=1, return_singular_vectors=False)[0]
    assert top == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-9)


def test_columns_and_arrays_come_back_as_they_were_given() -> None:
    model, loss = build("mlp", torch.float32)
    operator = gradctl.HessianOperator(loss, model)
    assert operator.dtype == np.float32
    for given in (np.ones(79), np.ones((79, 1)), np.ones(79, np.float32)):
        found = operator.matvec(given)
        assert found.shape == given.shape
        assert found.dtype == np.float32
    assert operator.matvec(torch.ones(79, 1)).shape == (79, 1)


def test_an_operator_says_what_it_is() -> None:
    model, loss = build("mlp")
    assert repr(gradctl.HessianOperator(loss, model)) == "<HessianOperator 79 x 79, float64, by double backward>"
    assert repr(gradctl.GGNOperator(loss, model)) == "<GGNOperator 79 x 79, float64, by double-vjp>"
    assert gradctl.HessianOperator(loss, model).notes == ()


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_refuses_products_after_the_parameters_have_moved(operator: Any) -> None:
    model, loss = build("mlp")
    found = operator(loss, model)
    with torch.no_grad():
        model[4].bias.add_(1.0)  # no product reads a bias: torch itself would say nothing
    with pytest.raises(gradctl.UsageError, match=rf"4\.bias has changed since this {operator.__name__} was built"):
        found(directions(model))


def test_an_operator_refuses_products_when_its_graph_was_freed() -> None:
    model, loss = build("mlp")
    value = loss()
    operator = gradctl.HessianOperator(value, model)
    value.backward()
    with pytest.raises(gradctl.UsageError, match="the graph of this loss is gone"):
        operator(directions(model))


def test_bfloat16_parameters_have_an_interface_in_float32() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    operator = gradctl.HessianOperator(lambda: (w**3).sum(), w)
    assert operator.dtype == np.float32
    assert operator.matvec(np.ones(2)).tolist() == [6.0, 12.0]


def test_parameters_of_several_dtypes_have_flat_vectors_of_the_widest() -> None:
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, dtype=F64, requires_grad=True)
    operator = gradctl.HessianOperator(lambda: a.double().pow(2).sum() * b.sum(), [a, b])
    found = operator(torch.tensor([1.0, 1.0], dtype=F64))
    assert found.tolist() == [4.0, 2.0]
    assert found.dtype == F64


def test_outputs_without_history_beside_one_with_move_nowhere() -> None:
    w = torch.ones(2, requires_grad=True)
    operator = gradctl.JacobianOperator((w * 2, torch.ones(1)), w)
    moved = operator(torch.ones(2))
    assert [each.tolist() for each in moved] == [[2.0, 2.0], [0.0]]
    with pytest.raises(gradctl.UsageError, match="the output has no history"):
        gradctl.JacobianOperator(torch.ones(1), w)


def test_a_backward_product_goes_through_a_fused_kernel_and_a_forward_one_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    operator = gradctl.JacobianOperator(nn.functional.scaled_dot_product_attention(q, q, q), q)
    assert operator.transposed(torch.ones(1, 2, 4, 8)).shape == q.shape
    with pytest.raises(gradctl.NoSecondDerivative, match="ScaledDotProduct"):
        operator(torch.ones(1, 2, 4, 8))
