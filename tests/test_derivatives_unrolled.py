"""unrolled: hypergradients that finite differences confirm, for every optimizer, over tasks, and at zero moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gradctl

F64 = torch.float64
OPTIMIZERS = ["sgd", "momentum", "adam"]


def problem() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    params = {"w": torch.randn(3, 2, dtype=F64, requires_grad=True), "b": torch.zeros(2, dtype=F64, requires_grad=True)}
    return params, torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)


def inner(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (torch.tanh(x @ params["w"] + params["b"]) - y).square().mean()


def difference(value: Callable[[Tensor], Tensor], at: Tensor, v: Tensor, step: float = 1e-6) -> float:
    return (float(value(at + step * v)) - float(value(at - step * v))) / (2 * step)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_gradient_of_the_start_is_the_finite_difference(optimizer: Any) -> None:
    params, x, y = problem()
    v = torch.randn(3, 2, dtype=F64)

    def outer(w: Tensor) -> Tensor:
        end = gradctl.unrolled(inner, {"w": w, "b": params["b"]}, 4, optimizer=optimizer, lr=0.05, batch=(x, y))
        return inner(end.params, x + 1, y).detach() if not w.requires_grad else inner(end.params, x + 1, y)

    g = torch.autograd.grad(outer(params["w"]), params["w"])[0]
    assert abs(float((g * v).sum()) - difference(outer, params["w"].detach(), v)) < 1e-7


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("what", ["lr", "weight_decay"])
def test_the_gradient_of_a_hyperparameter_is_the_finite_difference(optimizer: Any, what: str) -> None:
    params, x, y = problem()

    def outer(value: Tensor) -> Tensor:
        end = gradctl.unrolled(inner, params, 4, optimizer=optimizer, batch=(x, y), **{"lr": 0.05, what: value})
        return inner(end.params, x + 1, y)

    at = torch.tensor(0.03, dtype=F64, requires_grad=True)
    g = torch.autograd.grad(outer(at), at)[0]
    expected = difference(lambda value: outer(value).detach(), at.detach(), torch.ones((), dtype=F64))
    assert abs(float(g) - expected) < 1e-7


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_steps_as_the_optimizer_of_torch(optimizer: str) -> None:
    params, x, y = problem()
    mine = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    torchs = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    }[optimizer](list(mine.values()))
    losses = []
    for _ in range(5):
        torchs.zero_grad()
        loss = inner(mine, x, y)
        losses.append(loss.detach())
        loss.backward()
        torchs.step()
    found = gradctl.unrolled(
        inner,
        params,
        5,
        optimizer=optimizer,
        lr=0.05,
        momentum=0.8,
        weight_decay=0.1,
        batch=(x, y),  # type: ignore[arg-type]
    )
    for name, value in mine.items():
        assert float((found.params[name] - value).detach().abs().max()) < 1e-7
    assert float((found.losses - torch.stack(losses)).abs().max()) < 1e-7


def test_adam_at_an_exactly_zero_second_moment_has_finite_and_right_derivatives() -> None:
    # Column 1 of x is zero: the gradient of its weight is exactly zero at every step.
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=F64)
    start = {"w": torch.tensor([0.5, 0.3], dtype=F64, requires_grad=True)}
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def outer(s: Tensor) -> Tensor:
        end = gradctl.unrolled(
            lambda p: (s * x @ p["w"] - 1).square().mean(), start, 3, optimizer="adam", lr=0.1, eps=1e-3
        )
        return end.params["w"].square().sum()

    g = torch.autograd.grad(outer(scale), [scale, start["w"]])
    assert all(bool(torch.isfinite(one).all()) for one in g)
    expected = difference(lambda s: outer(s).detach(), scale.detach(), torch.ones((), dtype=F64))
    assert abs(float(g[0]) - expected) < 1e-6


def test_the_usual_root_is_nan_there() -> None:
    g = torch.zeros(1, requires_grad=True)
    torch.autograd.grad((g / ((g * g).sqrt() + 1e-8)).sum(), g)
    assert bool(torch.isnan(torch.autograd.grad((g / ((g * g).sqrt() + 1e-8)).sum(), g)[0]).all())


def test_the_start_is_no_copy() -> None:
    model = nn.Linear(3, 1)
    x = torch.randn(4, 3)
    end = gradctl.unrolled(
        lambda p, x: functional_call(model, p, (x,)).square().mean(), dict(model.named_parameters()), 2, batch=(x,)
    )
    functional_call(model, end.params, (x,)).mean().backward()
    assert model.weight.grad is not None
    assert float(model.weight.grad.abs().max()) > 0


def test_no_step_returns_the_start_itself() -> None:
    params, x, y = problem()
    end = gradctl.unrolled(inner, params, 0, batch=(x, y))
    assert all(end.params[name] is params[name] for name in params)
    assert end.gradient_norm is None
    assert end.losses.numel() == 0


def test_a_start_that_takes_no_gradient_still_passes_the_hypergradient_on() -> None:
    params, x, y = problem()
    fixed = {name: value.detach() for name, value in params.items()}
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    end = gradctl.unrolled(inner, fixed, 2, lr=lr, batch=(x, y))
    assert float(torch.autograd.grad(inner(end.params, x, y), lr)[0]) != 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tasks_by_vmap_are_the_tasks_one_by_one(optimizer: Any) -> None:
    params, _, _ = problem()
    x, y = torch.randn(4, 7, 3, dtype=F64), torch.randn(4, 7, 2, dtype=F64)

    def outer(tasks: Any) -> tuple[gradctl._derivatives.Unrolled, list[Tensor]]:  # type: ignore[name-defined]
        end = gradctl.unrolled(inner, params, 3, optimizer=optimizer, batch=(x, y), tasks=tasks)
        loss = sum(inner({n: v[t] for n, v in end.params.items()}, x[t] + 1, y[t]) for t in range(4))
        return end, list(torch.autograd.grad(loss, list(params.values())))

    by_hand = [torch.zeros_like(p) for p in params.values()]
    for t in range(4):
        end = gradctl.unrolled(inner, params, 3, optimizer=optimizer, batch=(x[t], y[t]))
        for total, g in zip(
            by_hand, torch.autograd.grad(inner(end.params, x[t] + 1, y[t]), list(params.values())), strict=True
        ):
            total += g
    for tasks, method in (("vmap", "vmap"), ("loop", "loop"), ("auto", "vmap")):
        end, found = outer(tasks)
        assert end.method == method
        assert end.losses.shape == (4, 3)
        assert end.gradient_norm is not None
        assert end.gradient_norm.shape == (4,)
        assert max(float((a - b).abs().max()) for a, b in zip(found, by_hand, strict=True)) < 1e-12


def test_tasks_that_vmap_cannot_run_go_one_by_one_and_say_why() -> None:
    params, _, _ = problem()
    x, y = torch.randn(4, 7, 3, dtype=F64), torch.randn(4, 7, 2, dtype=F64)

    def branching(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        loss = inner(p, x, y)
        return loss * 2 if loss > 0 else loss

    end = gradctl.unrolled(branching, params, 2, batch=(x, y), tasks="auto")
    assert end.method == "loop"
    assert "data-dependent" in end.why
    with pytest.raises(RuntimeError, match="data-dependent"):
        gradctl.unrolled(branching, params, 2, batch=(x, y), tasks="vmap")


def test_truncation_is_the_gradient_of_the_last_steps() -> None:
    params, x, y = problem()
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    found = gradctl.unrolled(inner, params, 5, lr=lr, batch=(x, y), truncate=2)
    early = gradctl.unrolled(inner, params, 3, lr=0.1, batch=(x, y))
    middle = {name: value.detach() for name, value in early.params.items()}
    late = gradctl.unrolled(inner, middle, 2, lr=lr, batch=(x, y))
    a = torch.autograd.grad(inner(found.params, x, y), [lr, params["w"]], allow_unused=True)
    b = torch.autograd.grad(inner(late.params, x, y), lr)
    assert abs(float(a[0]) - float(b[0])) < 1e-14
    assert a[1] is None


def test_the_bytes_of_the_graph_grow_with_the_steps_that_are_differentiated() -> None:
    params, x, y = problem()
    bytes_of = [gradctl.unrolled(inner, params, k, batch=(x, y)).saved_bytes for k in (1, 2, 4, 8)]
    assert bytes_of == sorted(bytes_of)
    assert bytes_of[3] - bytes_of[2] == 4 * (bytes_of[1] - bytes_of[0])
    short = gradctl.unrolled(inner, params, 8, batch=(x, y), truncate=2).saved_bytes
    assert short < bytes_of[2]


def test_a_step_of_the_callers_own() -> None:
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    start = {"x": torch.tensor(1.0, dtype=F64)}
    end = gradctl.unrolled(lambda s: {"x": 0.5 * (s["x"] + a / s["x"])}, start, 6, optimizer="step")
    assert abs(float(end.params["x"].detach()) - 2**0.5) < 1e-12
    assert abs(float(torch.autograd.grad(end.params["x"], a)[0]) - 0.5 / 2**0.5) < 1e-12


def test_an_update_of_the_callers_own() -> None:
    params, x, y = problem()

    def sign(params: dict[str, Tensor], grads: dict[str, Tensor], state: Any) -> tuple[dict[str, Tensor], Any]:
        count = 0 if state is None else state
        return {n: p - 0.1 * grads[n] / (1 + count) for n, p in params.items()}, count + 1

    found = gradctl.unrolled(inner, params, 2, optimizer=sign, batch=(x, y))
    first = gradctl.unrolled(inner, params, 1, lr=0.1, batch=(x, y))
    second = gradctl.unrolled(inner, first.params, 1, lr=0.05, batch=(x, y))
    assert float((found.params["w"] - second.params["w"]).detach().abs().max()) < 1e-15


def test_batches_and_rates_may_differ_by_step_and_parameter() -> None:
    params, x, y = problem()
    rates = {"w": torch.tensor(0.1, dtype=F64), "b": torch.tensor(0.0, dtype=F64)}
    found = gradctl.unrolled(inner, params, 2, lr=rates, batch=lambda step: (x + step, y))
    first = gradctl.unrolled(inner, params, 1, lr=rates, batch=(x, y))
    second = gradctl.unrolled(inner, first.params, 1, lr=rates, batch=(x + 1, y))
    assert float((found.params["w"] - second.params["w"]).detach().abs().max()) < 1e-15
    assert torch.equal(found.params["b"], params["b"])


def test_attention_in_the_inner_loss_has_its_second_derivative() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    params, x = dict(model.named_parameters()), torch.randn(2, 3, 4)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x, x, x), {"need_weights": False})[0].square().mean()

    end = gradctl.unrolled(loss, params, 1, batch=(x,))
    torch.nn.functional.mse_loss(end.params["out_proj.weight"], torch.zeros(4, 4)).backward()
    assert float(model.in_proj_weight.grad.abs().max()) > 0


# ---- refusals


def test_an_inner_loss_without_the_params_is_refused() -> None:
    model, x = nn.Linear(3, 1), torch.randn(2, 4, 3)
    params = dict(model.named_parameters())
    copies = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    for tasks in ("none", "vmap", "loop"):
        with pytest.raises(gradctl.UsageError, match="the inner loss uses none of params") as caught:
            gradctl.unrolled(lambda p, x: model(x).square().mean(), copies, 2, batch=(x,), tasks=tasks)  # type: ignore[arg-type]
        assert "functional_call" in str(caught.value.fix)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    table = {"t": torch.randn(5, 3, requires_grad=True)}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return nn.functional.embedding_bag(torch.tensor([[0, 1]]), p["t"]).square().sum()

    with pytest.raises(gradctl.NoSecondDerivative, match="embedding_bag"):
        gradctl.unrolled(loss, table, 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"params": {}}, "unrolled got no params"),
        ({"params": {"n": torch.zeros(2, dtype=torch.long)}}, "n has dtype torch.int64"),
        ({"steps": -1}, "steps is the number of inner steps, got -1"),
        ({"truncate": 0}, "truncate is the number of last steps to differentiate, got 0"),
        ({"optimizer": "lion"}, "optimizer is .* got 'lion'"),
        ({"tasks": "all"}, "tasks is .* got 'all'"),
        ({"tasks": "vmap", "batch": (torch.zeros(3, 1), torch.zeros(2, 1))}, "do not agree on the number of tasks"),
        ({"inner": lambda p: p["w"]}, r"the inner loss is \[2\], not one number"),
        ({"inner": lambda p: 3.0}, "the inner loss is float, not one number"),
    ],
)
def test_bad_input_has_its_sentence(change: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {
        "inner": lambda p, *_: p["w"].square().sum(),
        "params": {"w": torch.ones(2, requires_grad=True)},
        "steps": 1,
        **change,
    }
    with pytest.raises(gradctl.UsageError, match=sentence):
        gradctl.unrolled(**given)
