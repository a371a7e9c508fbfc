"""`custom_vjp`: what torch accepts in silence raises by name; what is kept, second derivatives, checking."""

from __future__ import annotations

import gc
import math
import re
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradctl
import settled

settled.compiling()
W = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
A = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.mT + bias


def right(inputs: tuple[Tensor, ...], out: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, weight, _ = inputs
    return grad @ weight, grad.mT @ x, grad.sum(0)


def given(*, of: int, become: Any) -> Any:
    """The right backward, with one gradient changed."""

    def backward(inputs: tuple[Tensor, ...], out: Tensor, grad: Tensor) -> tuple[Any, ...]:
        grads = list(right(inputs, out, grad))
        grads[of] = become(grads[of])
        return tuple(grads)

    return backward


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    return A.clone().requires_grad_(), W.clone().requires_grad_(), torch.zeros(3, requires_grad=True)


def test_a_right_backward_gives_what_autograd_gives() -> None:
    ours, theirs = leaves(), leaves()
    gradctl.custom_vjp(linear, right)(*ours).square().sum().backward()
    linear(*theirs).square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


SILENT = [
    # (which gradient, what becomes of it, the sentence); the first three torch sums, casts and casts without a word
    (2, lambda g: g.expand(2, 3), "shape [2, 3] for bias, which has shape [3]"),
    (1, lambda g: g.double(), "dtype float64 for weight, which has dtype float32"),
    (0, lambda g: g.bfloat16(), "dtype bfloat16 for x, which has dtype float32"),
    (0, lambda g: None, "None for x, which requires a gradient"),
    (1, lambda g: g.mT, "shape [4, 3] for weight, which has shape [3, 4]"),
    (2, lambda g: g.sum(), "shape [] for bias, which has shape [3]"),
    (2, lambda g: g[:1], "shape [1] for bias, which has shape [3]"),
    (0, lambda g: g.to("meta"), "device meta for x, which has device cpu"),
    (0, lambda g: 0.0, "type float for x, which has type Tensor"),
    (0, lambda g: g.to(torch.complex64), "dtype complex64 for x, which has dtype float32"),
]


@pytest.mark.parametrize(("of", "become", "sentence"), SILENT, ids=[row[2] for row in SILENT])
@pytest.mark.parametrize("where", ["eager", "torch.func"])
def test_a_gradient_that_cannot_be_one_raises_with_the_name_of_the_argument(
    of: int, become: Any, sentence: str, where: str
) -> None:
    wrong = gradctl.custom_vjp(linear, given(of=of, become=become))
    by_func = torch.func.grad(lambda *a: wrong(*a).sum(), argnums=(0, 1, 2))
    run = (lambda: wrong(*leaves()).sum().backward()) if where == "eager" else (lambda: by_func(A, W, torch.zeros(3)))
    with pytest.raises(gradctl.BadVjp, match=re.escape(f"custom_vjp(linear): backward returned {sentence}")) as caught:
        run()
    assert caught.value.fix


@pytest.mark.parametrize(
    ("grads", "got"),
    [
        (lambda grads: grads[:2], "2 gradients for 3 arguments"),
        (lambda grads: (*grads, None), "4 gradients for 3 arguments"),
        (lambda grads: grads[0], "one Tensor for 3 arguments"),
        (lambda grads: None, "one NoneType for 3 arguments"),
    ],
)
def test_a_wrong_count_raises_with_the_names_of_the_arguments(grads: Any, got: str) -> None:
    wrong = gradctl.custom_vjp(linear, lambda i, o, g: grads(right(i, o, g)))
    with pytest.raises(gradctl.BadVjp, match=got) as caught:
        wrong(*leaves()).sum().backward()
    assert caught.value.what == "the arguments are x, weight, bias"


def test_what_torch_does_with_these_in_silence() -> None:
    """The reason for all this: a bare Function accepts them and hands on wrong numbers."""

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.x = x
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return torch.ones(2, 3), None

    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    Bare.apply(x, y).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    assert y.grad is None


def test_swapped_gradients_of_equal_shapes_are_seen_by_the_check() -> None:
    def product(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    x, y = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    swapped = gradctl.custom_vjp(product, lambda i, o, g: (g * i[0], g * i[1]), check=True)
    with pytest.raises(gradctl.WrongGradient, match=r"custom_vjp\(product\): .*\bx\b"):
        swapped(x, y)
    with pytest.raises(gradctl.WrongGradient, match="product"):
        swapped(x, y)  # it stays refused
    gradctl.custom_vjp(product, lambda i, o, g: (g * i[1], g * i[0]), check=True)(x, y).sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(
    ("factor", "wrong"), [(1.0, False), (2.0, True), (1.01, True), (-1.0, True)], ids=["right", "twice", "1 %", "sign"]
)
def test_check_compares_with_finite_differences_once(factor: float, wrong: bool) -> None:
    calls: list[int] = []

    def cube(x: Tensor) -> Tensor:
        calls.append(1)
        return x**3

    f = gradctl.custom_vjp(cube, lambda i, o, g: factor * 3 * i[0] ** 2 * g, check=True)
    x = torch.randn(5, requires_grad=True)
    state = torch.get_rng_state()
    if wrong:
        with pytest.raises(gradctl.WrongGradient, match=r"custom_vjp\(cube\)"):
            f(x)
        return
    f(x)
    assert torch.equal(torch.get_rng_state(), state)
    before = len(calls)
    f(x).sum().backward()
    assert len(calls) == before + 1
    assert before > 2


def test_check_waits_for_a_call_that_needs_a_gradient() -> None:
    wrong = gradctl.custom_vjp(lambda x: x * 2, lambda i, o, g: g, check=True)
    wrong(torch.ones(2))
    with torch.no_grad():
        wrong(torch.ones(2, requires_grad=True))
    with pytest.raises(gradctl.WrongGradient):
        wrong(torch.ones(2, requires_grad=True))


def test_check_works_inside_of_a_checkpoint_and_under_autocast() -> None:
    f = gradctl.custom_vjp(linear, right, check=True)
    ours = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(f, *ours, use_reentrant=False)
    out.float().sum().backward()
    assert ours[1].grad is not None


def test_check_of_a_declared_second_derivative_finds_the_dropped_term() -> None:
    def wave(x: Tensor) -> Tensor:
        return torch.sin(x)

    detached = gradctl.custom_vjp(
        wave, lambda i, o, g: g * i[0].detach().cos(), check=True, second_order="differentiate"
    )
    with pytest.raises(gradctl.WrongGradient, match=r"custom_vjp\(wave\)"):
        detached(torch.randn(4, requires_grad=True))
    gradctl.custom_vjp(wave, lambda i, o, g: g * i[0].cos(), check=True, second_order="differentiate")(
        torch.randn(4, requires_grad=True)
    )


# -- what is kept -----------------------------------------------------------------------------------------------------


def x_times_exp(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    e = x.exp()
    return x * e, (x, e)


def x_times_exp_backward(kept: tuple[Tensor, Tensor], grad: Tensor) -> Tensor:
    x, e = kept
    return grad * (e + x * e)


@pytest.mark.parametrize("form", ["inputs", "returned"])
def test_an_input_changed_in_place_before_backward_raises(form: str) -> None:
    x = torch.randn(3, requires_grad=True)
    h = x * 1
    if form == "inputs":
        out = gradctl.custom_vjp(lambda x: x.square(), lambda i, o, g: 2 * i[0] * g)(h)
    else:
        out = gradctl.custom_vjp(x_times_exp, x_times_exp_backward, residuals="returned")(h)
    with torch.no_grad():
        h.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_residuals_go_through_saved_tensor_hooks_and_none_is_held_elsewhere() -> None:
    packed: list[Tensor] = []
    x = torch.randn(3, requires_grad=True)
    f = gradctl.custom_vjp(x_times_exp, x_times_exp_backward, residuals="returned")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1, lambda n: packed[n]):
        out = f(x)
    assert len(packed) == 2
    out.sum().backward()
    torch.testing.assert_close(x.grad, ((1 + x) * x.exp()).detach())


def test_a_residual_alone_keeps_no_input_alive() -> None:
    f = gradctl.custom_vjp(lambda x: (x.relu(), x > 0), lambda kept, g: g * kept, residuals="returned")
    leaf = torch.randn(1000, requires_grad=True)
    h = leaf * 2
    seen = weakref.ref(h.untyped_storage())
    out = f(h)
    del h
    gc.collect()
    assert seen() is None
    (first,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    assert torch.equal(first.detach(), 2.0 * (leaf > 0))
    with pytest.raises(gradctl.NoSecondDerivative):  # although nothing that backward used hangs on the input
        torch.autograd.grad((first * leaf).sum(), leaf)


def test_a_second_derivative_that_only_the_residual_carries_is_refused_beside_another_path() -> None:
    """`once_differentiable` lets this one through: the incoming gradient is a constant."""
    x = torch.tensor([0.7], requires_grad=True)
    f = gradctl.custom_vjp(lambda x: (x.exp(), x.detach().exp()), lambda e, g: g * e, residuals="returned")
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    with pytest.raises(gradctl.NoSecondDerivative, match="its gradient was differentiated"):
        torch.autograd.grad((first + x**2).sum(), x)


def test_a_third_part_that_does_not_need_the_second_derivative_is_not_disturbed() -> None:
    x, y = torch.tensor([0.7], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    f = gradctl.custom_vjp(lambda x: x.exp(), lambda i, o, g: g * o)
    first, other = torch.autograd.grad(f(x).sum() + (y**3).sum(), (x, y), create_graph=True)
    assert torch.autograd.grad(other.sum(), y)[0].item() == 12.0
    assert first.item() == pytest.approx(math.exp(0.7))


def test_an_intermediate_residual_keeps_its_term_in_the_second_derivative() -> None:
    """The note's row: a bare Function that saved it gives 5.44 where 8.15 is right."""
    x = torch.tensor([1.0], requires_grad=True)
    f = gradctl.custom_vjp(x_times_exp, x_times_exp_backward, residuals="returned", second_order="differentiate")
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    assert first.item() == pytest.approx(2 * math.e)
    assert second.item() == pytest.approx(3 * math.e)
    assert third.item() == pytest.approx(4 * math.e)


def test_a_forward_that_cannot_be_run_again_is_refused_when_its_gradient_is_differentiated() -> None:
    def dropped(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = (torch.rand_like(x) < 0.5).float()
        return x.square() * mask, mask * 2 * x

    f = gradctl.custom_vjp(dropped, lambda kept, g: g * kept, residuals="returned", second_order="differentiate")
    x = torch.randn(64, requires_grad=True)
    f(x).sum().backward()  # first order is no matter
    with pytest.raises(gradctl.NoSecondDerivative, match="a second run of forward gave other residuals"):
        torch.autograd.grad(f(x).sum(), x, create_graph=True)
    with pytest.raises(gradctl.NoSecondDerivative, match="a second run of forward gave other residuals"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum())(x.detach())


def test_forward_and_backward_run_once_each() -> None:
    ran: list[str] = []

    def forward(x: Tensor) -> Tensor:
        ran.append("forward")
        return x * 2

    def backward(inputs: Any, out: Tensor, grad: Tensor) -> Tensor:
        ran.append("backward")
        return grad * 2

    f, x = gradctl.custom_vjp(forward, backward), torch.ones(3, requires_grad=True)
    y = f(x)
    (y + y.square()).sum().backward()
    assert ran == ["forward", "backward"]
    ran.clear()
    checkpoint(f, x, use_reentrant=False).sum().backward()
    assert ran == ["forward", "forward", "backward"]


# -- arguments and results --------------------------------------------------------------------------------------------


def test_nested_arguments_and_results_keep_their_shape_and_their_names() -> None:
    Pair = namedtuple("Pair", "mean spread")

    def forward(state: dict[str, Any], gain: float, *more: Tensor) -> Any:
        return {"out": state["h"] * gain, "rest": Pair(state["c"][0] + more[0], torch.tensor([3, 4]))}

    def backward(inputs: Any, out: Any, grad: Any) -> Any:
        gain = inputs[1]
        assert grad["rest"].spread is None
        assert out["rest"].spread.tolist() == [3, 4]
        return {"h": grad["out"] * gain, "c": (grad["rest"].mean, None)}, None, grad["rest"].mean

    f = gradctl.custom_vjp(forward, backward)
    h, c, m = (torch.ones(2, requires_grad=True) for _ in range(3))
    out = f({"h": h, "c": (c, 7)}, 3.0, m)
    assert not out["rest"].spread.requires_grad
    (out["out"].sum() + 5 * out["rest"].mean.sum()).backward()
    assert [t.grad.tolist() for t in (h, c, m)] == [[3, 3], [5, 5], [5, 5]]

    def bad(inputs: Any, out: Any, grad: Any) -> Any:
        return {"h": grad["out"], "c": (grad["rest"].mean[:1], None)}, None, grad["rest"].mean

    with pytest.raises(gradctl.BadVjp, match=re.escape("shape [1] for state['c'][0], which has shape [2]")):
        gradctl.custom_vjp(forward, bad)({"h": h, "c": (c, 7)}, 3.0, m)["rest"].mean.sum().backward()

    def gives_a_number_one(inputs: Any, out: Any, grad: Any) -> Any:
        return {"h": grad["out"], "c": (grad["rest"].mean, None)}, torch.ones(()), grad["rest"].mean

    with pytest.raises(gradctl.BadVjp, match="a gradient for gain, which is no tensor"):
        gradctl.custom_vjp(forward, gives_a_number_one)({"h": h, "c": (c, 7)}, 3.0, m)["out"].sum().backward()

    def other_nest(inputs: Any, out: Any, grad: Any) -> Any:
        return (grad["out"], grad["rest"].mean), None, grad["rest"].mean

    with pytest.raises(gradctl.BadVjp, match="another structure for state"):
        gradctl.custom_vjp(forward, other_nest)({"h": h, "c": (c, 7)}, 3.0, m)["out"].sum().backward()


def test_defaults_and_keywords_are_arguments_too() -> None:
    def power(x: Tensor, exponent: int = 2) -> Tensor:
        return x**exponent

    f = gradctl.custom_vjp(power, lambda i, o, g: (g * i[1] * i[0] ** (i[1] - 1), None))
    x = torch.tensor([3.0], requires_grad=True)
    for call, want in ((lambda: f(x), 6.0), (lambda: f(x, 3), 27.0), (lambda: f(exponent=3, x=x), 27.0)):
        assert torch.autograd.grad(call(), x)[0].item() == want


def test_integer_tensors_are_arguments_without_a_gradient() -> None:
    def pick(table: Tensor, index: Tensor) -> Tensor:
        return table[index]

    def backward(inputs: Any, out: Tensor, grad: Tensor) -> Any:
        table, index = inputs
        return torch.zeros_like(table).index_add_(0, index, grad), None

    table = torch.randn(4, 2, requires_grad=True)
    gradctl.custom_vjp(pick, backward)(table, torch.tensor([1, 1, 3])).sum().backward()
    assert table.grad[:, 0].tolist() == [0, 2, 0, 1]


def test_a_tensor_that_is_returned_twice_or_is_an_input_gets_all_of_its_gradient() -> None:
    def twice(x: Tensor) -> Any:
        y = 2 * x
        return y, y, x

    f = gradctl.custom_vjp(twice, lambda i, o, g: 2 * g[0] + 2 * g[1] + g[2])
    for _ in range(2):  # the first call watches, the second does not
        x = torch.ones(2, requires_grad=True)
        a, b, c = f(x)
        (a + 10 * b + 100 * c).sum().backward()
        assert x.grad.tolist() == [122, 122]


def test_as_a_decorator() -> None:
    @gradctl.custom_vjp(backward=lambda kept, grad: grad * kept, residuals="returned")
    def softplus(x: Tensor) -> tuple[Tensor, Tensor]:
        """Smooth relu."""
        return F.softplus(x), torch.sigmoid(x)

    assert (softplus.__name__, softplus.__doc__) == ("softplus", "Smooth relu.")
    assert repr(softplus) == "<custom_vjp of softplus>"
    x = torch.randn(5, requires_grad=True)
    out = softplus(x)
    assert out.grad_fn.name() == "softplusBackward"
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.sigmoid(x.detach()))


@pytest.mark.parametrize("form", ["plain", "custom_fwd would"])
def test_backward_runs_under_the_autocast_of_forward(form: str) -> None:
    seen: list[Any] = []

    def backward(inputs: Any, out: Tensor, grad: Tensor) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        x, weight, _ = inputs
        return grad @ weight, (grad.mT @ x), grad.sum(0).float()

    x, w, b = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gradctl.custom_vjp(linear, backward)(x, w, b)
    out.sum().backward()
    assert seen == [(True, torch.bfloat16)]
    assert w.grad.dtype is torch.float32  # bfloat16 came back for it, as from a matmul of autocast
    reference = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(*reference).sum().backward()
    torch.testing.assert_close(w.grad, reference[1].grad, rtol=1e-2, atol=1e-2)
    seen.clear()
    plain = gradctl.custom_vjp(linear, backward)(*leaves())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain.sum().backward()
    assert seen[0][0] is False


# -- refusals ---------------------------------------------------------------------------------------------------------

OUTSIDE = torch.ones(2, requires_grad=True)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def product(self, x: Tensor) -> Tensor:
        return x * self.weight


def changes(x: Tensor) -> Tensor:
    return x.mul_(2)


class Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def zero(inputs: Any, out: Any, grad: Any) -> Any:
    return torch.zeros_like(inputs[0])


CALLS = [
    (lambda x: OUTSIDE * x, {}, "forward reads `OUTSIDE`, which requires a gradient and would get none"),
    (Layer().product, {}, "forward reads `self.weight`, which requires a gradient and would get none"),
    (changes, {}, "forward changed x in place"),
    (lambda x: 3, {}, "forward returned no tensor"),
    (lambda x: x * 2, {"residuals": "returned"}, "forward returned Tensor"),
    (lambda x: (x, x, x), {"residuals": "returned"}, "forward returned a tuple of 3"),
    (lambda x: (x * 2, Holder(x)), {"residuals": "returned"}, "a residual of type Holder hides a tensor"),
]


@pytest.mark.parametrize(("forward", "how", "sentence"), CALLS, ids=[row[2] for row in CALLS])
def test_a_forward_that_would_lose_a_gradient_is_refused(forward: Any, how: Any, sentence: str) -> None:
    f = gradctl.custom_vjp(forward, zero, **how)
    with pytest.raises(gradctl.UsageError, match=re.escape(sentence)) as caught:
        f(torch.randn(2, requires_grad=True) * 1)
    assert caught.value.fix
    if "in place" not in sentence:
        with pytest.raises(gradctl.UsageError, match="forward" if "hides" not in sentence else "hides"):
            torch.func.grad(lambda x: f(x).sum())(torch.randn(2))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: gradctl.custom_vjp(), "custom_vjp: backward is missing"),
        (lambda: gradctl.custom_vjp(3, zero), "custom_vjp: forward is of type int, not a function"),
        (lambda: gradctl.custom_vjp(linear, None), "custom_vjp: backward is of type NoneType, not a function"),
        (lambda: gradctl.custom_vjp(linear, right, residuals="all"), "custom_vjp: residuals='all'"),
        (lambda: gradctl.custom_vjp(linear, right, second_order="yes"), "custom_vjp: second_order='yes'"),
        (lambda: gradctl.custom_vjp(torch.sin, zero), "custom_vjp(sin): its arguments cannot be read"),
        (lambda: gradctl.custom_vjp(lambda x, *, eps: x, zero), "forward has the keyword-only argument eps"),
    ],
)
def test_what_cannot_be_a_custom_vjp_is_refused_when_it_is_made(make: Any, sentence: str) -> None:
    with pytest.raises(gradctl.UsageError, match=re.escape(sentence)) as caught:
        make()
    assert caught.value.fix


def test_a_wrong_number_of_arguments_is_the_type_error_of_any_function() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'bias'"):
        gradctl.custom_vjp(linear, right)(A, W)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_wrong_backward_is_refused_as_well() -> None:
    torch.compiler.reset()
    wrong = gradctl.custom_vjp(linear, given(of=2, become=lambda g: g.expand(2, 3)))
    compiled = torch.compile(lambda *a: wrong(*a).sum(), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"backward returned shape|BadVjp"):
        compiled(*leaves()).backward()
