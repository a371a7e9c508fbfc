"""What a custom gradient leaves as it was: bits, dtypes, memory; and how its result and its input may be changed."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl
import settled

settled.compiling()
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "stop": gradctl.stop,
    "scale": lambda x: gradctl.scale(x, 0.3),
    "scale by a tensor": lambda x: gradctl.scale(x, torch.tensor(0.3)),
    "reverse": gradctl.reverse,
    "clip norm": lambda x: gradctl.clip(x, norm=0.5),
    "clip per sample": lambda x: gradctl.clip(x, norm=0.5, per="sample"),
    "clip value": lambda x: gradctl.clip(x, value=0.5),
    "straight_through": lambda x: gradctl.straight_through(torch.clone, x),
    "straight_through clipped": lambda x: gradctl.straight_through(torch.clone, x, backward="clipped"),
    "replace": lambda x: gradctl.replace(x.detach(), gradient_of=x),
    "custom_vjp": gradctl.custom_vjp(lambda x: x.clone(), lambda inputs, out, grad: grad),
}
VIEWS = [name for name in OPS if not name.startswith(("straight", "custom", "stop"))]
every = pytest.mark.parametrize("name", list(OPS))


def bits(x: Tensor) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.view(BITS[x.dtype])


def special(dtype: torch.dtype) -> Tensor:
    real = dtype.to_real()
    info = torch.finfo(real)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, info.min, info.smallest_normal, info.eps, 1.0, -1.5]
    x = torch.tensor(values, dtype=torch.float64).to(real)
    denormal = torch.tensor([1, 2, 3], dtype=BITS[real]).view(real)
    signalling = torch.tensor([-1, -3], dtype=BITS[real]).view(real)  # nan with other payloads
    x = torch.cat([x, denormal, -denormal, signalling])
    return torch.complex(x, x.flip(0)) if dtype.is_complex else x


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_bit_for_bit_what_it_was_on_special_values(name: str, dtype: torch.dtype) -> None:
    if name == "straight_through clipped" and dtype.is_complex:
        return  # refused: test_custom_grad_table
    x = special(dtype)
    for grad in (False, True):
        out = OPS[name](x.clone().requires_grad_(grad))
        assert out.dtype is dtype
        assert torch.equal(bits(out.detach()), bits(x))


def test_the_detach_trick_that_this_replaces_is_not_exact() -> None:
    x = torch.tensor([100.0, -0.0, math.inf])
    small = torch.tensor([1.0007e-3, -0.0, math.inf])
    trick = x + (small - x).detach()
    exact = gradctl.replace(small, gradient_of=x)
    assert torch.equal(bits(exact), bits(small))
    assert abs(trick[0] - small[0]) > 1e-3 * small[0]  # 0.3 % off
    assert not math.copysign(1, trick[1]) < 0
    assert math.isnan(trick[2])
    half = torch.tensor(100.0).bfloat16(), torch.tensor(1e-3).bfloat16()
    assert half[0] + (half[1] - half[0]) == 0  # all of it is lost
    assert gradctl.replace(half[1], gradient_of=half[0]) == half[1]


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_gradient_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2).to(dtype).requires_grad_()
    out = OPS[name](x)
    if name != "stop":
        out.backward(torch.ones_like(out))
        assert x.grad is not None
        assert x.grad.dtype is dtype
        assert x.grad.shape == x.shape


@every
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)])
def test_any_shape_passes(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    if name == "clip per sample" and shape == ():
        return  # refused: below
    out = OPS[name](x)
    assert out.shape == shape
    if name != "stop":
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
        assert bool(x.grad.isfinite().all())


@every
def test_strides_do_not_matter(name: str) -> None:
    base = torch.randn(4, 6)
    v = torch.randn(6, 2)
    for of in (lambda b: b.mT[:, ::2], lambda b: b[:1].expand(6, 6)[:, :2], lambda b: b.mT.unfold(1, 2, 1)[:, 0]):
        leaf, plain = base.clone().requires_grad_(), base.clone()
        x = of(leaf)
        out = OPS[name](x)
        assert torch.equal(out, of(plain))
        if name == "stop":
            continue
        assert out.stride() == x.stride() or "straight" in name or "custom" in name
        (found,) = torch.autograd.grad((out * v).sum(), x)
        packed = of(plain).contiguous().requires_grad_()
        (want,) = torch.autograd.grad((OPS[name](packed) * v).sum(), packed)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", VIEWS)
def test_nothing_is_copied(name: str) -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert OPS[name](x).data_ptr() == x.data_ptr()
    assert OPS[name](x.detach()).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("name", VIEWS)
def test_changing_the_result_in_place_is_refused(name: str) -> None:
    h = torch.randn(3, 2, requires_grad=True) * 2
    out = OPS[name](h)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        out.add_(1)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        nn.functional.relu(OPS[name](h), inplace=True)


@pytest.mark.parametrize("name", VIEWS)
def test_a_result_whose_input_was_changed_in_place_is_refused_and_never_wrong(name: str) -> None:
    leaf = torch.randn(3, 2, requires_grad=True)
    h = leaf * 2
    value = h if name != "replace" else h.detach()
    out = OPS[name](h)
    value.add_(1)
    with pytest.raises(RuntimeError, match=r"modified inplace|modified by an inplace operation"):
        (out * out).sum().backward()


def test_the_result_of_custom_vjp_may_be_changed_in_place() -> None:
    x = torch.randn(5, requires_grad=True)
    double = gradctl.custom_vjp(lambda x: (2 * x, ()), lambda kept, grad: 2 * grad, residuals="returned")
    nn.functional.relu(double(x), inplace=True).sum().backward()
    assert torch.equal(x.grad, 2.0 * (x > 0))


def test_stop_shares_memory_and_a_saved_input_notices_a_change() -> None:
    x = torch.randn(3, requires_grad=True) * 2
    loss = x.square().sum()
    gradctl.stop(x).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", list(OPS))
def test_a_parameter_gives_a_plain_tensor_and_a_subclass_passes(name: str) -> None:
    class Tagged(Tensor):
        pass

    assert type(OPS[name](nn.Parameter(torch.randn(3)))) is Tensor
    x = torch.randn(3).as_subclass(Tagged).requires_grad_()
    out = OPS[name](x)
    if name not in ("stop",):
        out.sum().backward()
        assert x.grad is not None
    assert isinstance(out, Tagged) or "custom" in name or "through" in name


@pytest.mark.parametrize("call", [gradctl.stop, lambda t: gradctl.scale(t, 2.0), gradctl.reverse])
def test_nests_are_mapped_tensor_by_tensor(call: Callable[[Any], Any]) -> None:
    Pair = namedtuple("Pair", "out state")
    a, b, c = (torch.randn(2, requires_grad=True) for _ in range(3))
    found = call({"pair": Pair(a, [b, None]), "rest": (c,)})
    assert type(found["pair"]) is Pair
    assert found["pair"].state[1] is None
    factor = {"stop": None}.get(getattr(call, "__name__", ""), 2.0 if "lambda" in repr(call) else -1.0)
    total = found["pair"].out.sum() + 2 * found["pair"].state[0].sum() + 3 * found["rest"][0].sum()
    if factor is None:
        assert not total.requires_grad
        return
    total.backward()
    assert [t.grad.tolist() for t in (a, b, c)] == [[k * factor] * 2 for k in (1, 2, 3)]


def test_stop_passes_what_has_no_gradient_anyway() -> None:
    batch = {"x": torch.randn(2, requires_grad=True), "y": torch.tensor([1, 2]), "name": "train"}
    found = gradctl.stop(batch)
    assert not found["x"].requires_grad
    assert found["y"].tolist() == [1, 2]
    assert found["name"] == "train"


def test_scale_by_zero_gives_zeros_where_stop_gives_none() -> None:
    x = torch.randn(3, requires_grad=True)
    gradctl.scale(x, 0.0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3))


def test_a_factor_that_is_changed_in_place_before_backward_is_refused() -> None:
    x, s = torch.randn(3, requires_grad=True), torch.tensor(2.0)
    out = gradctl.scale(x, s)
    s.fill_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_factor_in_float32_multiplies_a_half_gradient_before_it_is_rounded() -> None:
    x = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    s = torch.tensor([1.0, 0.37, 3e-3, 1e-8])
    gradctl.scale(x, s).backward(torch.full((4,), 1.2578125, dtype=torch.bfloat16))
    assert torch.equal(x.grad, (1.2578125 * s).bfloat16())


def test_vmap_meets_each_sample_with_its_own_factor() -> None:
    x, s = torch.randn(5, 2, 3), torch.randn(3, 5)
    found = torch.func.vmap(lambda x, s: torch.func.grad(lambda x: gradctl.scale(x, s).sum())(x), in_dims=(0, 1))(x, s)
    torch.testing.assert_close(found, s.mT[:, None].expand(5, 2, 3))
    alike = torch.func.vmap(lambda s: gradctl.scale(torch.ones(2, 3), s), in_dims=1)(s)
    assert alike.shape == (5, 2, 3)


# -- clip -------------------------------------------------------------------------------------------------------------


def clipped(g: Tensor, **how: Any) -> Tensor:
    x = torch.zeros(g.shape, dtype=g.dtype, requires_grad=True)
    (found,) = torch.autograd.grad(gradctl.clip(x, **how), x, g)
    return found


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0.01, 10), st.booleans())
def test_clip_by_norm_is_what_clip_grad_norm_does_to_one_tensor(rows: int, cols: int, most: float, each: bool) -> None:
    g = torch.randn(rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(rows * 7 + cols))
    found = clipped(g, norm=most, per="sample" if each else "tensor")
    parts = list(g.clone().split(1)) if each else [g.clone()]
    for part in parts:
        holder = nn.Parameter(torch.zeros_like(part))
        holder.grad = part
        nn.utils.clip_grad_norm_([holder], most)
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-7)  # torch adds 1e-6 to the norm


def test_a_gradient_within_the_bound_passes_bit_for_bit() -> None:
    g = torch.randn(100)
    assert torch.equal(bits(clipped(g, norm=float(g.norm()) * 1.001)), bits(g))
    assert torch.equal(bits(clipped(g, value=float(g.abs().max()))), bits(g))
    assert torch.equal(clipped(torch.zeros(3), norm=1.0), torch.zeros(3))


def test_a_half_gradient_is_measured_in_float32() -> None:
    g = torch.full((1000,), 100.0, dtype=torch.float16)  # its norm is 3162, whose square no float16 holds
    torch.testing.assert_close(clipped(g, norm=1.0).float().norm(), torch.tensor(1.0), rtol=1e-3, atol=0)
    assert torch.equal(clipped(g, value=1e6), g)  # a bound beyond float16


def test_a_norm_that_is_not_finite_gives_nan_and_never_a_plausible_number() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        assert bool(clipped(torch.tensor([1.0, bad, 2.0]), norm=1.0).isnan().all())
    assert bool(clipped(torch.tensor([3e30, 1.0]), norm=1.0).isnan().all())
    by_row = clipped(torch.tensor([[1.0, math.nan], [3.0, 4.0]]), norm=1.0, per="sample")
    assert bool(by_row[0].isnan().all())
    torch.testing.assert_close(by_row[1], torch.tensor([0.6, 0.8]))


def test_clip_by_value_keeps_nan_and_bounds_inf() -> None:
    found = clipped(torch.tensor([math.nan, math.inf, -math.inf, 0.2]), value=0.5)
    assert math.isnan(found[0])
    assert found[1:].tolist() == [0.5, -0.5, pytest.approx(0.2)]


def test_clip_by_value_keeps_the_direction_of_a_complex_number() -> None:
    torch.testing.assert_close(clipped(torch.tensor([3 + 4j, 0.1j]), value=1.0), torch.tensor([0.6 + 0.8j, 0.1j]))


def test_per_sample_is_what_vmap_does() -> None:
    x, v = torch.randn(4, 3), torch.randn(4, 3) * torch.tensor([[0.1], [1], [2], [5]])
    by_vmap = torch.func.vmap(torch.func.grad(lambda x, v: (gradctl.clip(x, norm=1.0) * v).sum()))(x, v)
    torch.testing.assert_close(by_vmap, clipped(v, norm=1.0, per="sample"))
    one_dim = torch.randn(6)
    torch.testing.assert_close(clipped(one_dim, norm=0.5, per="sample"), clipped(one_dim, value=0.5))


# -- straight_through -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (-0.1, 0.3), (0.5, 2.0), (-2.0, -0.5), (-math.inf, 0.0)])
def test_clipped_includes_its_ends_and_nothing_beyond(dtype: torch.dtype, bounds: tuple[float, float] | None) -> None:
    low, high = torch.tensor(bounds or (-1.0, 1.0), dtype=torch.float64).to(dtype)
    far = torch.tensor([math.inf, -math.inf], dtype=dtype)
    at = torch.stack([low, high])
    x = torch.cat([at, at.nextafter(far[0]), at.nextafter(far[1])])
    x = x[x.isfinite()].requires_grad_()
    out = gradctl.straight_through(torch.sign, x, backward="clipped", **({"bounds": bounds} if bounds else {}))
    out.backward(torch.full_like(out, math.inf))  # 0 times inf would be nan
    assert x.grad.tolist() == [math.inf if low <= value <= high else 0.0 for value in x.detach()]


def test_a_quantised_tensor_is_as_good_as_its_function() -> None:
    x = torch.randn(50, requires_grad=True)
    q = torch.round(x.detach() * 4) / 4
    out = gradctl.straight_through(q, x)
    assert torch.equal(out, q)
    out.backward(x.detach())
    assert torch.equal(x.grad, x.detach())


def test_a_surrogate_trains_its_own_parameters() -> None:
    x, slope = torch.randn(5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    gradctl.straight_through(torch.sign, x, backward=lambda x: torch.tanh(slope * x)).sum().backward()
    deriv = 1 - torch.tanh(2 * x.detach()) ** 2
    torch.testing.assert_close(x.grad, 2 * deriv)
    torch.testing.assert_close(slope.grad, (x.detach() * deriv).sum())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_schedule_of_numbers_stays_right_in_a_compiled_function() -> None:
    torch.compiler.reset()
    step = torch.compile(lambda x, s: gradctl.reverse(x * 3, s).sum(), backend="aot_eager", fullgraph=True)
    for strength in (0.0, 0.25, 0.5, 1.0):
        x = torch.randn(3, requires_grad=True)
        step(x, strength).backward()
        torch.testing.assert_close(x.grad, torch.full((3,), -3 * strength))
