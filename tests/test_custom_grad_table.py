"""Every custom gradient in every place where a gradient is taken: right, or refused by name; nothing silent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradctl
import settled

settled.compiling()
Q = torch.tensor([3.0, -2.0, 0.5, 1.0])
X = torch.tensor([0.3, -1.6, 0.45, 0.9])
V = torch.tensor([0.5, -2.0, 1.5, 0.25])
U = torch.tensor([1.0, 0.5, -2.0, 3.0])


def norm_clipped(g: Tensor, most: float = 1.0) -> Tensor:
    return g * min(1.0, most / float(g.abs().square().sum().sqrt()))


def value_clipped(g: Tensor) -> Tensor:
    if g.is_complex():
        return torch.stack([z if abs(z) <= 0.4 else 0.4 * z / abs(z) for z in g])
    return torch.stack([z if abs(z) <= 0.4 else 0.4 * z.sign() for z in g])


def silu_slope(x: Tensor) -> Tensor:
    s = 1 / (1 + torch.exp(-x))
    return s + x * s * (1 - s)


def silu_forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    s = torch.sigmoid(x)
    return x * s, (x, s)


def silu_backward(kept: tuple[Tensor, Tensor], grad: Tensor) -> Tensor:
    x, s = kept
    return grad * (s + x * s * (1 - s))


plain_silu = gradctl.custom_vjp(
    lambda x: x * torch.sigmoid(x),
    lambda inputs, out, grad: silu_backward((inputs[0], torch.sigmoid(inputs[0])), grad),
    second_order="differentiate",
)
kept_silu = gradctl.custom_vjp(silu_forward, silu_backward, residuals="returned", second_order="differentiate")
closed_silu = gradctl.custom_vjp(silu_forward, silu_backward, residuals="returned")


def inside(x: Tensor, g: Tensor) -> Tensor:
    return torch.stack([b if abs(a) <= 1 else b * 0 for a, b in zip(x, g, strict=True)])


@dataclass
class Case:
    """`op` on `h`, the value that it must have, and the gradient that it must hand to `h` for an incoming `g`."""

    op: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    tangent: Callable[[Tensor, Tensor], Tensor] | None  # None: forward mode is refused
    twice: bool = True  # False: a second derivative is refused
    is_complex: bool = True  # False: complex numbers are refused


def same(h: Tensor) -> Tensor:
    return h


def sample_of(h: Tensor) -> Tensor:
    return Q.to(h.dtype).broadcast_to(h.shape)


CASES = {
    "stop": Case(gradctl.stop, same, lambda h, g: g * 0, lambda h, t: t * 0),
    "scale": Case(lambda h: gradctl.scale(h, 0.5), same, lambda h, g: 0.5 * g, lambda h, t: 0.5 * t),
    "scale by a tensor": Case(
        lambda h: gradctl.scale(h, torch.tensor([1.0, 0.0, -2.0, 3.0], dtype=h.real.dtype)),
        same,
        lambda h, g: torch.tensor([1.0, 0.0, -2.0, 3.0]) * g,
        lambda h, t: torch.tensor([1.0, 0.0, -2.0, 3.0]) * t,
    ),
    "reverse": Case(lambda h: gradctl.reverse(h, 0.7), same, lambda h, g: -0.7 * g, lambda h, t: -0.7 * t),
    "clip norm": Case(lambda h: gradctl.clip(h, norm=1.0), same, lambda h, g: norm_clipped(g), None),
    "clip value": Case(lambda h: gradctl.clip(h, value=0.4), same, lambda h, g: value_clipped(g), None),
    "straight_through": Case(
        lambda h: gradctl.straight_through(torch.sgn, h), torch.sgn, lambda h, g: g, lambda h, t: t
    ),
    "straight_through clipped": Case(
        lambda h: gradctl.straight_through(torch.sgn, h, backward="clipped"),
        torch.sgn,
        inside,
        inside,
        is_complex=False,
    ),
    "straight_through tanh": Case(
        lambda h: gradctl.straight_through(torch.sgn, h, backward=torch.tanh),
        torch.sgn,
        lambda h, g: (1 - h.tanh().square()).conj() * g,
        lambda h, t: (1 - h.tanh().square()) * t,
    ),
    "replace": Case(lambda h: gradctl.replace(sample_of(h), gradient_of=h), sample_of, lambda h, g: g, lambda h, t: t),
    "custom_vjp": Case(plain_silu, F.silu, lambda h, g: silu_slope(h) * g, None, is_complex=False),
    "custom_vjp kept": Case(kept_silu, F.silu, lambda h, g: silu_slope(h) * g, None, is_complex=False),
    "custom_vjp closed": Case(closed_silu, F.silu, lambda h, g: silu_slope(h) * g, None, twice=False, is_complex=False),
}
# Both are torch's own: its rules for forward mode are scripts, and Dynamo makes an instance of every Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
every = pytest.mark.parametrize("name", list(CASES))


def loss(case: Case, x: Tensor, v: Tensor = V) -> Tensor:
    return (case.op(x * 2) * v).sum().real


def expected(case: Case, x: Tensor, v: Tensor = V) -> Tensor:
    return 2 * case.back(x.detach() * 2, v)


def gradient(value: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, x, materialize_grads=True)
    return found


@every
def test_backward_hands_on_the_gradient_that_the_call_promises(name: str) -> None:
    case, x = CASES[name], X.clone().requires_grad_()
    assert torch.equal(case.op(x.detach() * 2), case.value(x.detach() * 2)) or "custom" in name
    if name == "stop":
        assert not loss(case, x).requires_grad
    else:
        loss(case, x).backward()
        torch.testing.assert_close(x.grad, expected(case, x))


@every
def test_torch_func_grad_is_the_same(name: str) -> None:
    found = torch.func.grad(lambda x: loss(CASES[name], x))(X)
    torch.testing.assert_close(found, expected(CASES[name], X))


@every
def test_vmap_of_grad_is_a_loop_over_the_samples(name: str) -> None:
    xs, vs = torch.stack([X, X * 2, -X]), torch.stack([V, V * 0.1, V])
    found = torch.func.vmap(torch.func.grad(lambda x, v: loss(CASES[name], x, v)))(xs, vs)
    torch.testing.assert_close(found, torch.stack([expected(CASES[name], x, v) for x, v in zip(xs, vs, strict=True)]))


@every
def test_grad_of_vmap_is_a_loop_over_the_samples(name: str) -> None:
    xs, vs = torch.stack([X, X * 2, -X]), torch.stack([V, V * 0.1, V])

    def total(xs: Tensor) -> Tensor:
        return torch.func.vmap(lambda x, v: loss(CASES[name], x, v), in_dims=(1, 0))(xs.mT, vs).sum()

    one_by_one = torch.stack([expected(CASES[name], x, v) for x, v in zip(xs, vs, strict=True)])
    torch.testing.assert_close(torch.func.grad(total)(xs), one_by_one)
    leaf = xs.clone().requires_grad_()
    torch.testing.assert_close(gradient(total(leaf), leaf) if name != "stop" else leaf.detach() * 0, one_by_one)


@every
def test_vmap_inside_of_vmap_is_a_loop_in_a_loop(name: str) -> None:
    xs = torch.stack([X, X * 2, -X, X + 1, X - 1, X * 0.1]).reshape(2, 3, 4)
    found = torch.func.vmap(torch.func.vmap(torch.func.grad(lambda x: loss(CASES[name], x))))(xs)
    torch.testing.assert_close(found, torch.stack([torch.stack([expected(CASES[name], x) for x in row]) for row in xs]))


@every
def test_jacrev_is_one_backward_a_row(name: str) -> None:
    found = torch.func.jacrev(lambda x: CASES[name].op(x * 2))(X)
    rows = [expected(CASES[name], X, row) for row in torch.eye(4)]
    torch.testing.assert_close(found, torch.stack(rows))


def second_by_hand(name: str, x: Tensor) -> Tensor:
    """d/dx of <U, d/dx sum(op(2x)²)>, on paper: with y = op(2x), v = 2y, the inner gradient is 2·back(v)."""
    case, h = CASES[name], 2 * x
    v = 2 * case.value(h)
    if name == "clip norm":
        size = v.norm()
        to_v = (U - v * (v @ U) / size**2) / size  # back is c·v with c = 1/‖v‖, and ‖v‖ > 1 here
        return 2 * norm_clipped(4 * to_v)
    if name == "clip value":
        return 2 * value_clipped(4 * U * (v.abs() <= 0.4))
    if "tanh" in name:
        slope = 1 - h.tanh().square()
        through_slope = 2 * U * v * (-2 * h.tanh() * slope)
        return 2 * (slope * 4 * slope * U + through_slope)
    if "custom" in name:
        s = torch.sigmoid(h)
        bend = s * (1 - s) * (2 + h * (1 - 2 * s))
        return 8 * (silu_slope(h) ** 2 + F.silu(h) * bend) * U
    return 2 * case.back(h, 4 * case.back(h, U))


@every
def test_a_second_derivative_is_that_of_the_gradient_or_is_refused(name: str) -> None:
    case, x = CASES[name], X.clone().requires_grad_()
    if name == "stop":
        return  # there is no first one
    (first,) = torch.autograd.grad(case.op(x * 2).square().sum(), x, create_graph=True)
    torch.testing.assert_close(first.detach(), expected(case, x, 2 * case.value(2 * X)))
    if not case.twice:
        with pytest.raises(gradctl.NoSecondDerivative, match=r"custom_vjp\(silu_forward\): its gradient was differ"):
            gradient((first * U).sum(), x)
        return
    torch.testing.assert_close(gradient((first * U).sum(), x), second_by_hand(name, X))


@every
def test_a_second_derivative_by_torch_func_is_the_same(name: str) -> None:
    case = CASES[name]

    def inner(x: Tensor) -> Tensor:
        return (torch.func.grad(lambda x: case.op(x * 2).square().sum())(x) * U).sum()

    if not case.twice:
        with pytest.raises(gradctl.NoSecondDerivative, match="its gradient was differentiated"):
            torch.func.grad(inner)(X)
        return
    torch.testing.assert_close(torch.func.grad(inner)(X), second_by_hand(name, X))


@every
def test_forward_mode_is_the_transpose_of_backward_or_is_refused(name: str) -> None:
    case = CASES[name]

    def by_func() -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda x: case.op(x * 2), (X,), (U,))

    def by_level() -> tuple[Tensor, Tensor | None]:
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(case.op(forward_ad.make_dual(X, U) * 2)))

    for run in (by_func, by_level):
        if case.tangent is None:
            with pytest.raises(gradctl.UsageError, match=r"(clip|custom_vjp\(.*\)): no forward-mode derivative"):
                run()
            continue
        value, tangent = run()
        assert torch.equal(value, case.value(2 * X))
        torch.testing.assert_close(U * 0 if tangent is None else tangent, case.tangent(2 * X, 2 * U))


@every
def test_forward_over_reverse_is_the_second_derivative_or_is_refused(name: str) -> None:
    case = CASES[name]

    def first(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: case.op(x * 2).square().sum())(x)

    if case.tangent is None:
        with pytest.raises((gradctl.UsageError, gradctl.NoSecondDerivative)):
            torch.func.jvp(first, (X,), (U,))
        return
    torch.testing.assert_close(torch.func.jvp(first, (X,), (U,))[1], second_by_hand(name, X))


@every
def test_a_compiled_graph_without_breaks_gives_the_same(name: str) -> None:
    case, x = CASES[name], X.clone().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: loss(case, x) + 0 * x.sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled(x), x), expected(case, x))


@every
@pytest.mark.parametrize("around", [False, True])
def test_a_checkpoint_recomputes_it_and_the_gradient_passes_once(name: str, around: bool) -> None:
    case, x = CASES[name], X.clone().requires_grad_()

    def part(x: Tensor) -> Tensor:
        return case.op(torch.sin(x) * 2) if not around else torch.sin(case.op(x * 2))

    out = checkpoint(part, x, use_reentrant=False)
    found = gradient((out * V).sum() + 0 * x.sum(), x)
    sin, cos = X.sin(), X.cos()
    if around:
        want = 2 * case.back(2 * X, V * case.value(2 * X).cos())
    else:
        want = 2 * case.back(2 * sin, V) * cos
    torch.testing.assert_close(found, want)


@every
def test_autocast_around_it_gives_the_gradient_in_the_dtype_of_what_it_got(name: str) -> None:
    case, x, w = CASES[name], X.clone().requires_grad_(), torch.eye(4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = F.linear(x, w)
        out = case.op(h)
    assert h.dtype is out.dtype is torch.bfloat16
    v = V.bfloat16()
    found = gradient((out * v).sum() + 0 * h.sum(), h)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), case.back(h.detach().float(), V), rtol=0.02, atol=0.02)


@every
def test_autocast_after_it_leaves_its_gradient_in_float32(name: str) -> None:
    case, x = CASES[name], X.clone().requires_grad_()
    w = torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.linear(case.op(x * 2), w)
    found = gradient((out * V.bfloat16()).sum() + 0 * x.sum(), x)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected(case, x, V * w.diag()), rtol=0.02, atol=0.02)


@every
def test_complex_numbers_are_right_or_refused(name: str) -> None:
    case = CASES[name]
    x = torch.complex(X, X.flip(0)).requires_grad_()
    v = torch.complex(V, V.flip(0))
    if "custom" in name:
        return  # what backward does with them is the caller's
    if not case.is_complex:
        with pytest.raises(gradctl.UsageError, match="x is complex"):
            case.op(x)
        return
    found = gradient((case.op(x * 2) * v.conj()).sum().real + 0 * x.real.sum(), x)
    torch.testing.assert_close(found, 2 * case.back(2 * x.detach(), v))


@every
def test_a_result_that_is_used_twice_gets_its_gradients_summed_first(name: str) -> None:
    case, x = CASES[name], X.clone().requires_grad_()
    y = case.op(x * 2)
    found = gradient((y * V).sum() + (y * U).sum() + 0 * x.sum(), x)
    torch.testing.assert_close(found, expected(case, x, V + U))


@every
def test_without_gradients_nothing_is_recorded(name: str) -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        out = CASES[name].op(x)
    assert not out.requires_grad
    with torch.inference_mode():
        out = CASES[name].op(x)
        assert torch.equal(out, CASES[name].op(X))
        assert not out.requires_grad


@every
def test_functorch_inside_of_a_graph_gives_both_gradients(name: str) -> None:
    """A per-sample gradient of one argument, and an ordinary backward through the other."""
    case, scale = CASES[name], torch.tensor(2.0, requires_grad=True)
    inner = torch.func.grad(lambda x: (case.op(x * 2) * V).sum() * scale)(X)
    if name == "stop":
        assert torch.equal(inner, X * 0)
        return
    if not case.twice:
        with pytest.raises(gradctl.NoSecondDerivative):
            gradient((inner * U).sum(), scale)
        return
    found = gradient((inner * U).sum(), scale)
    one, more = expected(case, X, V * 2), expected(case, X, V * 2.001)
    torch.testing.assert_close(inner.detach(), one)
    torch.testing.assert_close(found, ((more - one) * U).sum() / 0.001, rtol=1e-2, atol=5e-3)


def test_backward_with_is_refused_inside_of_torch_func() -> None:
    def inner(x: Tensor) -> Any:
        gradctl.backward_with(x * 2, torch.ones(4))
        return x.sum()

    with pytest.raises(gradctl.UsageError, match=r"backward_with inside a torch\.func transform"):
        torch.func.grad(inner)(X)
    with pytest.raises(gradctl.UsageError, match=r"backward_with inside a torch\.func transform"):
        torch.func.vmap(inner)(torch.eye(4))
