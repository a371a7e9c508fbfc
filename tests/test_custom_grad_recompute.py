"""Custom gradients inside of a region that is recomputed: the same bits as without, and backward runs once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl
from gradctl._recompute import recompute

double = gradctl.custom_vjp(lambda x: x * 2, lambda inputs, out, grad: 2 * grad)
exponential = gradctl.custom_vjp(
    lambda x: (x.exp(), (x.exp(),)), lambda residuals, grad: grad * residuals[0], residuals="returned"
)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "stop": lambda x: gradctl.stop(x) * x,
    "scale": lambda x: gradctl.scale(x, 0.3),
    "reverse": lambda x: gradctl.reverse(x, strength=0.5),
    "clip by norm": lambda x: gradctl.clip(x, norm=0.1),
    "clip by value": lambda x: gradctl.clip(x, value=0.01),
    "straight_through": lambda x: gradctl.straight_through(torch.round, x),
    "straight_through, a result": lambda x: gradctl.straight_through(x.detach().sign(), x),
    "straight_through, clipped": lambda x: gradctl.straight_through(torch.sign, x, backward="clipped"),
    "straight_through, a function": lambda x: gradctl.straight_through(torch.sign, x, backward=torch.tanh),
    "replace": lambda x: gradctl.replace(x.detach().floor(), gradient_of=x),
    "custom_vjp": lambda x: double(x),
    "custom_vjp, residuals": lambda x: exponential(x),
}
HOW: dict[str, dict[str, Any]] = {
    "tape": {},
    "tape, matmul kept": {"keep": "matmul"},
    "rerun": {"engine": "rerun"},
}


class Model(nn.Module):
    """A custom gradient between layers, dropout before it."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3))
        self.after = nn.Sequential(nn.Linear(8, 3), nn.GELU())
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.call(self.before(x)))


def bits(model: Model, x: Tensor) -> list[Tensor]:
    """Return the output and every gradient, that of the input first."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", CALLS)
def test_a_recomputed_custom_gradient_has_the_bits_of_the_plain_one(name: str, how: str) -> None:
    model = Model(CALLS[name])
    x = torch.randn(5, 6)
    expected = bits(model, x)
    with recompute(model, **HOW[how]):
        for _ in range(3):  # the first call learns, later ones note less
            assert all(torch.equal(a, b) for a, b in zip(bits(model, x), expected, strict=True))


@pytest.mark.parametrize("how", HOW)
def test_a_recomputed_backward_of_one_s_own_runs_once(how: str) -> None:
    fired: list[float] = []

    def backward(inputs: tuple[Tensor], out: Tensor, grad: Tensor) -> Tensor:
        fired.append(1.0)
        return 3 * grad

    triple = gradctl.custom_vjp(lambda x: x * 3, backward)
    region = recompute(lambda x: triple(x.sin()).cos().sum(), **HOW[how])
    for calls in range(1, 4):
        x = torch.randn(4, requires_grad=True)
        region(x).backward()
        assert len(fired) == calls
        torch.testing.assert_close(x.grad, -(3 * x.detach().sin()).sin() * 3 * x.detach().cos())


@pytest.mark.parametrize("how", HOW)
def test_a_second_derivative_goes_through_a_recomputed_custom_gradient(how: str) -> None:
    scaled = recompute(lambda x: gradctl.scale(x, 0.5).exp().sum(), **HOW[how])
    by_hand = gradctl.custom_vjp(lambda x: x.exp(), lambda i, out, grad: grad * out, second_order="differentiate")
    own = recompute(lambda x: by_hand(x).sum(), **HOW[how])
    x = torch.randn(4, dtype=torch.double, requires_grad=True)
    for region, factor in ((scaled, 0.25), (own, 1.0)):
        for _ in range(2):
            (gradient,) = torch.autograd.grad(region(x), x, create_graph=True)
            (second,) = torch.autograd.grad(gradient.sum(), x)
            torch.testing.assert_close(second, factor * x.detach().exp())


@pytest.mark.parametrize("how", HOW)
def test_what_backward_returns_wrongly_is_told_in_a_recomputed_region_too(how: str) -> None:
    wrong = gradctl.custom_vjp(lambda x: x * 2, lambda inputs, out, grad: 2 * grad.sum(0))
    x = torch.randn(3, 4, requires_grad=True)
    region = recompute(lambda x: wrong(x.sin()).sum(), **HOW[how])
    with pytest.raises(gradctl.BadVjp) as error:
        region(x).backward()
    assert "backward returned shape [4] for x, which has shape [3, 4]" in str(error.value)


@pytest.mark.parametrize("how", HOW)
def test_complex_and_half_values_keep_their_bits_in_a_recomputed_region(how: str) -> None:
    for dtype in (torch.complex64, torch.bfloat16, torch.float16):
        x = torch.randn(8, dtype=dtype, requires_grad=True)

        def function(x: Tensor) -> Tensor:
            return gradctl.reverse(gradctl.scale(x * x, 0.3), strength=0.5)

        region = recompute(function, **HOW[how])
        expected = torch.autograd.grad(function(x).abs().float().sum(), x)[0]
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(region(x).abs().float().sum(), x)[0], expected)
