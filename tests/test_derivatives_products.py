"""hvp, ggnvp, jvp, vjp: exact on every kind of network, and refusing what would be wrong in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

import gradctl
from derivative_nets import F64, build, dense_hessian, directions, flat, gradient_differences, worst

KINDS = ["mlp", "cnn", "transformer", "lstm"]
CE = nn.functional.cross_entropy


@pytest.mark.parametrize("kind", KINDS)
def test_hvp_is_the_difference_of_gradients(kind: str) -> None:
    model, loss = build(kind)
    v = directions(model)
    assert worst(gradctl.hvp(loss, model, v), gradient_differences(model, loss, v)) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_hvp_is_bitwise_the_double_backward_written_by_hand(kind: str) -> None:
    model, loss = build(kind, torch.float32)
    v, params = directions(model), list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(), params, create_graph=True)
    by_hand = torch.autograd.grad(gradient, params, list(v.values()))
    found = gradctl.hvp(loss, model, v)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), by_hand, strict=True))


@pytest.mark.parametrize("form", ["module", "dict", "list", "generator", "tensor loss", "flat", "numpy"])
def test_every_form_of_the_arguments_gives_the_same_product(form: str) -> None:
    model, loss = build("mlp")
    v = directions(model)
    wanted = flat(gradctl.hvp(loss, model, v))
    if form == "module":
        found = flat(gradctl.hvp(loss, model, v))
    elif form == "dict":
        found = flat(gradctl.hvp(loss, dict(model.named_parameters()), v))
    elif form == "list":
        answer = gradctl.hvp(loss, list(model.parameters()), list(v.values()))
        assert isinstance(answer, list)
        found = torch.cat([each.reshape(-1) for each in answer])
    elif form == "generator":
        answer = gradctl.hvp(loss, model.parameters(), iter(v.values()))
        assert isinstance(answer, tuple)
        found = torch.cat([each.reshape(-1) for each in answer])
    elif form == "tensor loss":
        found = flat(gradctl.hvp(loss(), model, v))
    elif form == "flat":
        found = gradctl.hvp(loss, model, flat(v))
    else:
        array = gradctl.hvp(loss, model, flat(v).numpy())
        assert isinstance(array, np.ndarray)
        found = torch.from_numpy(array)
    assert torch.equal(found, wanted)


def test_a_function_of_inputs_is_called_with_them_and_they_need_no_gradient() -> None:
    x = torch.tensor([0.3, -1.2], dtype=F64)
    found = gradctl.hvp(lambda z: (z**3).sum(), x, torch.ones(2, dtype=F64))
    assert torch.allclose(found, 6 * x)
    assert not x.requires_grad


def test_an_argument_with_a_default_is_left_to_its_default() -> None:
    w = torch.tensor([2.0], requires_grad=True)

    def loss(batch: float = 3.0) -> Tensor:
        return (batch * w**2).sum()

    assert gradctl.hvp(loss, [w], [torch.ones(1)])[0].item() == 6.0


def test_grad_is_not_touched_and_the_graph_of_a_loss_is_kept() -> None:
    model, loss = build("mlp")
    value = loss()
    gradctl.hvp(value, model, directions(model))
    gradctl.ggnvp(value, model, directions(model))
    assert all(param.grad is None for param in model.parameters())
    value.backward()
    assert all(param.grad is not None for param in model.parameters())


def test_products_work_under_no_grad_and_return_no_graph() -> None:
    model, loss = build("mlp")
    v = directions(model)
    with torch.no_grad():
        found = gradctl.hvp(loss, model, v)
    assert worst(found, gradctl.hvp(loss, model, v)) == 0
    assert not any(value.requires_grad for value in found.values())


def test_autocast_around_the_call_does_not_reach_the_derivatives() -> None:
    model, loss = build("mlp", torch.float32)
    v, value = directions(model), loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradctl.hvp(value, model, v)
    assert worst(found, gradctl.hvp(value, model, v)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["auto", "double-vjp"])
def test_ggnvp_is_the_jacobian_twice_around_the_hessian_of_the_loss(kind: str, method: Any) -> None:
    model, loss = build(kind)
    closure = [cell.cell_contents for cell in loss.__closure__ or ()]
    x = next(each for each in closure if isinstance(each, Tensor) and each.is_floating_point())
    y = next(each for each in closure if isinstance(each, Tensor) and not each.is_floating_point())
    v, params = directions(model), list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = model(x)
    jacobian = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(each, params, retain_graph=True)])
            for each in z.reshape(-1)
        ]
    )
    hessian = torch.autograd.functional.hessian(lambda o: CE(o.view(7, 3), y), z.detach().reshape(-1))
    wanted = jacobian.T @ hessian @ jacobian @ flat(v)
    found = flat(gradctl.ggnvp(loss, model, v, method=method))
    assert float((found - wanted).abs().max()) < 1e-12
    assert torch.allclose(gradctl.ggnvp(loss, model, flat(v), method=method), wanted, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: CE(z, torch.tensor([0, 1, 2, 1, 0])),
        lambda z: CE(z, torch.tensor([0, 1, -100, 1, 0]), weight=torch.tensor([1.0, 2.0, 3.0], dtype=F64)),
        lambda z: CE(z, torch.tensor([0, 1, 2, 1, 0]), label_smoothing=0.1),
        lambda z: CE(z, torch.full((5, 3), 1 / 3, dtype=F64)),
        lambda z: nn.functional.mse_loss(z, torch.ones(5, 3, dtype=F64)) * 3.0,
        lambda z: (z - 1.0).pow(2).mean(),
        lambda z: nn.functional.binary_cross_entropy_with_logits(z, torch.ones(5, 3, dtype=F64)),
        lambda z: nn.functional.huber_loss(z, torch.ones(5, 3, dtype=F64)),
        lambda z: (
            CE(z[:, :2], torch.tensor([0, 1, 1, 1, 0])) + nn.functional.mse_loss(z[:, 2:], torch.ones(5, 1, dtype=F64))
        ),
        lambda z: -nn.functional.log_softmax(z, 1)[:, 0].sum() / 5,
        lambda z: -nn.functional.log_softmax(z, -1)[:, 0].sum() / 5,
        lambda z: -nn.functional.log_softmax(z, 0)[0].sum(),
        lambda z: nn.functional.kl_div(z.log_softmax(1), torch.full((5, 3), 0.2, dtype=F64), reduction="sum"),
    ],
)
def test_the_outputs_are_found_for_known_losses(loss: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(5, 4, dtype=F64)
    v = directions(model)

    def named() -> tuple[Tensor, Tensor]:
        z = model(x)
        return loss(z), z

    value, z = named()
    wanted = gradctl.ggnvp(value, model, v, outputs=z)
    for found in (
        gradctl.ggnvp(lambda: loss(model(x)), model, v),
        gradctl.ggnvp(loss(model(x)), model, v),
        gradctl.ggnvp(named, model, v),
        gradctl.ggnvp(named, model, v, method="double-vjp"),
    ):
        assert worst(found, wanted) < 1e-12
    params, hessian = list(model.parameters()), torch.autograd.functional.hessian(loss, z.detach()).view(15, 15)
    jacobian = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(each, params, retain_graph=True)])
            for each in z.reshape(-1)
        ]
    )
    assert torch.allclose(flat(wanted), jacobian.T @ (hessian @ (jacobian @ flat(v))), atol=1e-12)


def test_ggnvp_refuses_a_loss_whose_outputs_cannot_be_seen() -> None:
    w = torch.randn(3, requires_grad=True)
    with pytest.raises(
        gradctl.UsageError, match="the outputs of the network are not to be seen from this loss"
    ) as told:
        gradctl.ggnvp(w.exp().sum(), [w], [torch.ones(3)])
    assert "ExpBackward" in str(told.value)
    assert "outputs=" in str(told.value)


def test_ggnvp_refuses_a_loss_that_is_divided_by_what_is_trained() -> None:
    w = torch.randn(3, requires_grad=True)
    with pytest.raises(gradctl.UsageError, match="DivBackward"):
        gradctl.ggnvp(torch.ones(3).div(torch.log_softmax(w, 0)).sum(), [w], [torch.ones(3)])


def test_ggnvp_refuses_a_penalty_that_does_not_pass_the_outputs() -> None:
    model, x = nn.Linear(2, 1), torch.randn(3, 2)
    z = model(x)
    loss = z.square().mean() + model.weight.square().sum()
    with pytest.raises(gradctl.UsageError, match="reaches the parameters without passing the outputs"):
        gradctl.ggnvp(loss, model, directions(model), outputs=z)


def test_ggnvp_refuses_outputs_of_another_loss() -> None:
    model, x = nn.Linear(2, 1), torch.randn(3, 2)
    with pytest.raises(gradctl.UsageError, match="reaches the parameters without passing the outputs"):
        gradctl.ggnvp(model(x).square().mean(), model, directions(model), outputs=model(x))


def test_a_part_under_no_grad_is_constant_for_the_forward_product_too() -> None:
    model, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=F64)

    def outputs() -> Tensor:
        with torch.no_grad():
            target = model(x)
        return model(x) * target

    v = directions(model)
    wanted = gradctl.jvp(outputs, model, v, method="double-vjp")
    assert torch.equal(gradctl.jvp(outputs, model, v), wanted)
    with pytest.raises(gradctl.UsageError, match="under no_grad, which a tangent would pass"):
        gradctl.jvp(outputs, model, v, method="forward")


@pytest.mark.parametrize("kind", KINDS)
def test_jvp_and_vjp_are_transposed_to_each_other_and_jvp_is_a_difference(kind: str) -> None:
    model, loss = build(kind)
    x = next(
        c.cell_contents
        for c in loss.__closure__ or ()
        if isinstance(c.cell_contents, Tensor) and c.cell_contents.is_floating_point()
    )
    v, u = directions(model), torch.randn(7, 3, dtype=F64)
    moved = gradctl.jvp(lambda: model(x), model, v)
    back = gradctl.vjp(lambda: model(x), model, u)
    assert abs(float((moved * u).sum() - (flat(back) * flat(v)).sum())) < 1e-10
    with torch.no_grad():
        for name, param in model.named_parameters():
            param += 1e-6 * v[name]
        up = model(x)
        for name, param in model.named_parameters():
            param -= 2e-6 * v[name]
        down = model(x)
    assert float((moved - (up - down) / 2e-6).abs().max()) < 1e-6


def test_jvp_forward_and_double_vjp_agree_and_leave_values_and_versions() -> None:
    model, _ = build("mlp")
    x, v = torch.randn(4, 5, dtype=F64), directions(model)
    before = [(param.detach().clone(), param._version) for param in model.parameters()]
    forward = gradctl.jvp(lambda: model(x), model, v, method="forward")
    assert torch.allclose(forward, gradctl.jvp(model(x), model, v), atol=1e-12)
    for param, (value, version) in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, value)
        assert param._version == version
        assert torch.autograd.forward_ad._current_level == -1


def test_a_graph_made_before_a_forward_product_is_good_after_it() -> None:
    model, loss = build("mlp")
    expected = torch.autograd.grad(loss(), list(model.parameters()))
    value = loss()
    gradctl.ggnvp(loss, model, directions(model), method="dual")
    value.backward()
    assert all(torch.equal(p.grad, plain) for p, plain in zip(model.parameters(), expected, strict=True))


def test_several_outputs_and_inputs_keep_their_structure() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    moved = gradctl.jvp(lambda p, q: {"sum": p.sum() * q, "p": p * p}, (a, b), (torch.ones(2), torch.tensor(1.0)))
    assert moved["sum"].item() == 9.0
    assert moved["p"].tolist() == [2.0, 4.0]
    back = gradctl.vjp(lambda p, q: (p.sum() * q, p * p), (a, b), (torch.tensor(1.0), torch.ones(2)))
    assert [each.tolist() for each in back] == [[5.0, 7.0], 3.0]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=25)
def test_for_any_shapes_hvp_is_a_row_combination_of_the_dense_hessian(n: int, d: int, out: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(d, 3), nn.Sigmoid(), nn.Linear(3, out)).double(), torch.randn(n, d, dtype=F64)
    loss = lambda: model(x).pow(3).mean()  # noqa: E731
    v = directions(model, seed)
    assert torch.allclose(flat(gradctl.hvp(loss, model, v)), dense_hessian(model, loss) @ flat(v), atol=1e-11)


# -- what stands in the way -------------------------------------------------------------------------------------------


def test_a_loss_through_fused_attention_is_refused_by_name_and_the_function_is_right() -> None:
    model, loss = build("transformer", torch.float32)
    v = directions(model)
    with pytest.raises(
        gradctl.NoSecondDerivative, match="ScaledDotProductFlashAttentionForCpu has no second deriv"
    ) as told:
        gradctl.hvp(loss(), model, v)
    assert "pass a function that computes the loss" in str(told.value)
    assert gradctl.HessianOperator(loss, model).notes == (
        "attention ran with the math backend: the fused kernels have no second derivative",
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda w: nn.functional.embedding_bag(torch.tensor([[0, 1], [1, 2]]), w).square().sum(), "embedding_bag"),
        (
            lambda w: nn.functional.embedding(torch.tensor([0, 1]), w, sparse=True).square().sum(),
            r"embedding\(sparse=True\)",
        ),
        (
            lambda w: nn.functional.ctc_loss(
                w.log_softmax(1).unsqueeze(1), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
            ),
            "ctc_loss",
        ),
        (lambda w: checkpoint(lambda z: z.sin(), w, use_reentrant=True).sum(), r"checkpoint\(use_reentrant=True\)"),
    ],
)
def test_operations_without_a_second_derivative_are_refused_by_name(
    make: Callable[[Tensor], Tensor], name: str
) -> None:
    w = torch.randn(4, 3, requires_grad=True)
    for loss in (make(w), lambda: make(w)):
        with pytest.raises(gradctl.NoSecondDerivative, match=f"{name} has no second derivative"):
            gradctl.hvp(loss, [w], [torch.ones(4, 3)])


def test_the_wrong_second_derivative_of_weight_norm_is_refused_until_torch_mends_it() -> None:
    v = torch.randn(3, 4, dtype=F64, requires_grad=True)
    g = torch.rand(3, 1, dtype=F64, requires_grad=True)
    with pytest.raises(GradcheckError):
        torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g))
    with pytest.raises(gradctl.NoSecondDerivative, match="weight_norm has a wrong second derivative"):
        gradctl.hvp(lambda: torch._weight_norm(v, g, 0).square().sum(), [v, g], [v.detach(), g.detach()])


def test_non_reentrant_checkpoints_are_differentiated_twice() -> None:
    w = torch.randn(4, dtype=F64, requires_grad=True)
    found = gradctl.hvp(
        lambda: checkpoint(lambda z: z.exp(), w, use_reentrant=False).sum(), w, torch.ones(4, dtype=F64)
    )
    assert torch.allclose(found, w.detach().exp())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


class KeepsIntermediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.exp()
        ctx.save_for_backward(x, e)
        return x * e

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, e = ctx.saved_tensors
        return grad * (e + x * e)


class KeepsAttribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.e = x.exp()
        return ctx.e * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.e * 2


class KeepsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        y = x.exp() * factor
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, _ = ctx.saved_tensors
        return grad * y, None


def test_a_function_marked_once_differentiable_is_refused_where_torch_drops_its_terms() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    w = torch.tensor([3.0], requires_grad=True)
    loss = (Once.apply(x) * w).sum()
    gradient = torch.autograd.grad(loss, [x, w], create_graph=True)
    by_torch = torch.autograd.grad(gradient, [w], [torch.zeros(1), torch.ones(1)], allow_unused=True, retain_graph=True)
    assert by_torch[0] is None  # nothing was said
    with pytest.raises(gradctl.NoSecondDerivative, match="Once has no second derivative"):
        gradctl.hvp(loss, [x, w], [torch.ones(1), torch.ones(1)])


@pytest.mark.parametrize("function", [KeepsIntermediate, KeepsAttribute])
def test_a_function_that_keeps_an_intermediate_is_refused_where_torch_drops_a_term(function: Any) -> None:
    x = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(gradctl.NoSecondDerivative, match=f"{function.__name__} keeps a value for its backward"):
        gradctl.hvp(function.apply(x).sum(), x, torch.ones(1))


def test_a_function_that_keeps_inputs_and_outputs_is_right() -> None:
    x, factor = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0])
    found = gradctl.hvp(KeepsOutput.apply(x, factor).sum(), x, torch.ones(1))
    assert found.item() == pytest.approx(2 * np.e)


def test_a_faulty_function_beside_the_parameters_does_not_matter() -> None:
    x, w = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    assert gradctl.hvp((Once.apply(x) + w**2).sum(), w, torch.ones(1)).item() == 2.0


def test_the_padding_row_of_an_embedding_is_held_constant_as_its_gradient_is() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(4, 3, padding_idx=0).double()
    with torch.no_grad():
        table.weight[0] = 1.0
    index, v = torch.tensor([0, 1, 2, 0]), torch.randn(4, 3, dtype=F64)

    def loss() -> Tensor:
        return table(index).sum(1).pow(3).sum() + table(index).prod()

    rest = table.weight[1:].detach().clone().requires_grad_()

    def oracle(rows: Tensor) -> Tensor:
        looked_up = torch.cat([table.weight[:1].detach(), rows])[index]
        return looked_up.sum(1).pow(3).sum() + looked_up.prod()

    _, wanted = torch.autograd.functional.hvp(oracle, rest, v[1:])
    operator = gradctl.HessianOperator(loss, table.weight)
    found = operator(v)
    assert torch.allclose(found[1:], wanted)
    assert found[0].abs().max() == 0
    assert operator.notes == ("row 0 of an embedding is its padding: held constant, as its gradient is always zero",)


def test_parameters_that_are_not_used_get_zeros_or_are_refused_as_asked() -> None:
    used, idle = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    loss = used.pow(3).sum()
    found = gradctl.hvp(loss, {"used": used, "idle": idle}, {"used": torch.ones(2), "idle": torch.ones(3)})
    assert found["used"].tolist() == [6.0, 6.0]
    assert found["idle"].tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(gradctl.UsageError, match="the loss does not depend on idle"):
        gradctl.hvp(loss, {"used": used, "idle": idle}, {"used": used, "idle": idle}, unused="error")


def test_a_loss_of_other_parameters_is_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(gradctl.UsageError, match="the loss does not depend on w"):
        gradctl.hvp(lambda: torch.ones(2, requires_grad=True).sum(), {"w": w}, {"w": torch.ones(2)})


def test_a_loss_that_is_linear_has_a_hessian_of_zeros() -> None:
    w = torch.ones(2, requires_grad=True)
    assert gradctl.hvp((3 * w).sum(), w, torch.ones(2)).tolist() == [0.0, 0.0]


def test_batchnorm_in_training_mode_moves_its_statistics_once_and_couples_the_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=F64), torch.tensor([0, 1, 0, 1, 0, 1])
    loss = lambda: CE(model(x), y)  # noqa: E731
    v = directions(model)
    wanted = gradient_differences(model, loss, v)
    for call in (
        lambda: gradctl.hvp(loss, model, v),
        lambda: gradctl.ggnvp(loss, model, v),
        lambda: gradctl.jvp(lambda: model(x), model, v),
        lambda: gradctl.hessian_diagonal(loss, model),
    ):
        before = int(model[1].num_batches_tracked)
        call()
        assert int(model[1].num_batches_tracked) == before + 1
    assert worst(gradctl.hvp(loss, model, v), wanted) < 1e-7


def test_a_forward_product_that_cannot_be_carried_leaves_buffers_and_random_state_as_one_forward_does() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.body, self.drop = nn.BatchNorm1d(3), nn.LSTM(3, 3, batch_first=True), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.drop(self.norm(x)).unsqueeze(1))[0][:, 0]

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 3)
    torch.manual_seed(1)
    model(x)
    after = torch.get_rng_state()
    mean = model.norm.running_mean.clone()
    model.norm.reset_running_stats()
    torch.manual_seed(1)
    found = gradctl.jvp(lambda: model(x), model, directions(model))
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(model.norm.running_mean, mean)
    torch.manual_seed(1)
    assert torch.equal(found, gradctl.jvp(lambda: model(x), model, directions(model), method="double-vjp"))


def test_dropout_has_one_mask_for_the_whole_product() -> None:
    w = torch.randn(50, dtype=F64, requires_grad=True)
    torch.manual_seed(3)
    found = gradctl.hvp(lambda: nn.functional.dropout(w, 0.5).pow(2).sum(), w, torch.ones(50, dtype=F64))
    assert set(found.tolist()) == {0.0, 8.0}


def test_in_place_relu_and_weights_used_outside_their_module_are_right() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=F64)
    loss = lambda: (model(x).sin() * nn.functional.linear(x, model[0].weight)[:, :2]).sum()  # noqa: E731
    v = directions(model)
    assert torch.allclose(flat(gradctl.hvp(loss, model, v)), dense_hessian(model, loss) @ flat(v), atol=1e-12)


def test_tied_parameters_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[0].weight
    x = torch.randn(4, 3, dtype=F64)
    loss = lambda: model(x).square().sum()  # noqa: E731
    v = directions(model)
    assert list(v) == ["0.weight"]
    assert worst(gradctl.hvp(loss, model, v), gradient_differences(model, loss, v)) < 1e-7
    both = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(gradctl.UsageError, match=r"0\.weight and 2\.weight are one tensor"):
        gradctl.hvp(loss, both, both)


def test_frozen_parameters_of_a_module_are_left_out_and_a_frozen_tensor_is_refused() -> None:
    model, loss = build("mlp")
    model[0].requires_grad_(False)
    assert list(gradctl.hvp(loss, model, directions(model))) == ["2.weight", "2.bias", "4.weight", "4.bias"]
    with pytest.raises(gradctl.UsageError, match=r"0\.weight does not require a gradient"):
        gradctl.hvp(loss, dict(model.named_parameters()), directions(model))
    model.requires_grad_(False)
    with pytest.raises(gradctl.UsageError, match="Sequential has no parameter that requires a gradient"):
        gradctl.hvp(loss, model, {})


def test_a_freed_graph_is_refused_with_what_freed_it() -> None:
    w = torch.ones(2, requires_grad=True)
    loss = w.pow(3).sum()
    loss.backward()
    with pytest.raises(gradctl.UsageError, match="the graph of this loss is gone"):
        gradctl.hvp(loss, w, torch.ones(2))


def test_a_value_changed_in_place_is_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    loss = w.pow(3).sum()
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(gradctl.UsageError, match="changed in place since it was computed"):
        gradctl.hvp(loss, w, torch.ones(2))


W = torch.ones(2, 2, requires_grad=True)


@pytest.mark.parametrize(
    ("loss", "params", "v", "sentence"),
    [
        (W * 2, [W], [W], r"the loss has shape \[2, 2\], not one number"),
        (W.detach().sum(), [W], [W], "the loss has no history"),
        (lambda: 3.0, [W], [W], "the loss is a float, not a tensor"),
        (W.sum(), [], [], "params is empty"),
        (W.sum(), [torch.ones(2, dtype=torch.int64)], [W], r"params\[0\] is int64"),
        (W.sum(), [torch.ones(2, dtype=torch.complex64, requires_grad=True)], [W], r"params\[0\] is complex64"),
        (W.sum(), [W], [torch.ones(3)], r"v\['params\[0\]'\] has shape \[3\], not \[2, 2\]"),
        (W.sum(), [W], torch.ones(3), r"v has shape \[3\], not \[4\]"),
        (W.sum(), [W], np.ones(3), r"v has shape \[3\], not \[4\]"),
        (W.sum(), [W], [W.double()], r"v\['params\[0\]'\] is float64, not float32"),
        (W.sum(), [W], [], "v has 0 tensors for 1"),
        (W.sum(), {"w": W}, {"x": W}, "v has no 'w'"),
        (W.sum(), {"w": W}, {"w": W, "x": W}, "v has a 'x'"),
        (W.sum(), {"w": W}, nn.Linear(2, 2), "v is a module"),
        (W.sum(), [W], 3.0, "v is a float"),
        (lambda x: x.sum(), {"w": W}, {"w": W}, "must be given arguments, and params are named"),
        (W.to(torch.complex64).sum(), [W], [W], "the loss is complex64"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(loss: Any, params: Any, v: Any, sentence: str) -> None:
    with pytest.raises(gradctl.UsageError, match=sentence):
        gradctl.hvp(loss, params, v)


@pytest.mark.parametrize("call", [gradctl.jvp, gradctl.ggnvp])
def test_forward_methods_need_a_function(call: Any) -> None:
    w = torch.ones(2, requires_grad=True)
    method = "forward" if call is gradctl.jvp else "dual"
    with pytest.raises(gradctl.UsageError, match=f"method='{method}' needs a function"):
        call(nn.functional.mse_loss(w, torch.zeros(2)), w, torch.ones(2), method=method)


def test_outputs_beside_a_function_or_twice_are_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(gradctl.UsageError, match="outputs= is for a loss that is computed already"):
        gradctl.ggnvp(lambda: w.square().sum(), w, torch.ones(2), outputs=w)
    with pytest.raises(gradctl.UsageError, match="the function returned a tuple of 3"):
        gradctl.ggnvp(lambda: (w.sum(), w, w), w, torch.ones(2))


def test_an_error_of_the_program_is_the_one_that_is_raised() -> None:
    def broken() -> Tensor:
        raise KeyError("mine")

    w = torch.ones(2, requires_grad=True)
    for call in (gradctl.hvp, gradctl.ggnvp, gradctl.jvp):
        with pytest.raises(KeyError, match="mine"):
            call(broken, w, torch.ones(2))


@pytest.fixture(scope="module")
def compiler() -> None:
    """Have torch.compile do once what it does to torch when it is first used; no test has leaked that."""
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(1))


@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_is_refused_by_name() -> None:
    w = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda z: z.sin() * z, backend="aot_eager", fullgraph=True)
    with pytest.raises(gradctl.NoSecondDerivative, match="a compiled function has no second derivative"):
        gradctl.hvp(compiled(w).sum(), w, torch.ones(3))
