"""Norms and clipping of many gradients at once, against `torch.nn.utils` and float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl
from gradctl._buckets import Buckets

SHAPES = [(4, 3), (5, 3), (2, 3), (7,), (1,), (), (3,), (300, 300), (2, 3, 3, 3), (0, 3), (6, 3), (9,), (8,)]


def parameters(shapes: list[tuple[int, ...]], seed: int, without: set[int] = frozenset()) -> list[nn.Parameter]:  # pyright: ignore[reportArgumentType]
    torch.manual_seed(seed)
    found = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for index, parameter in enumerate(found):
        if index not in without:
            parameter.grad = torch.randn(parameter.shape)
    return found


def norm_in_float64(found: list[nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in found if p.grad is not None))


@settings(max_examples=60)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=60),
    seed=st.integers(0, 999),
    data=st.data(),
    limit=st.sampled_from([1e-3, 0.7, 5.0, 1e6]),
)
def test_norm_and_clipped_gradients_are_those_of_torch(
    shapes: list[tuple[int, ...]], seed: int, data: st.DataObject, limit: float
) -> None:
    without = data.draw(st.sets(st.integers(0, len(shapes) - 1)))
    ours, theirs = parameters(shapes, seed, without), parameters(shapes, seed, without)
    gradients = Buckets().of(ours)
    norm = gradients.norm()
    assert isinstance(norm, float)
    assert norm == pytest.approx(norm_in_float64(theirs), rel=3e-6)
    torch.nn.utils.clip_grad_norm_(theirs, limit)
    if norm > limit:
        gradients.multiply(limit / (norm + 1e-6))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None and other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=0.0)


def test_gradients_stay_the_same_objects() -> None:
    found = parameters([(4, 3)] * 10, 0)
    before = [p.grad for p in found]
    Buckets().of(found).multiply(0.5)
    assert all(p.grad is was for p, was in zip(found, before, strict=True))


def test_many_gradients_are_gathered_and_multiplied_with_a_few_calls() -> None:
    found = parameters([(32,)] * 1000, 0)
    gradients = Buckets().of(found)
    with torch.profiler.profile() as profile:
        gradients.norm()
        gradients.multiply(0.5)
    assert sum(event.count for event in profile.key_averages()) < 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_16_bit_gradients_does_not_overflow(dtype: torch.dtype) -> None:
    found = [nn.Parameter(torch.zeros(64, 64, dtype=dtype)) for _ in range(14)]
    for parameter in found:
        parameter.grad = torch.full((64, 64), 30000.0, dtype=dtype)
    exact = norm_in_float64(found)
    norm = Buckets().of(found).norm()
    assert norm == pytest.approx(exact, rel=1e-3)
    if dtype is torch.float16:
        assert math.isinf(torch.nn.utils.clip_grad_norm_(found, math.inf).item())  # torch's is: then all become 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(4, 3), (300, 300), ()])
def test_one_bad_element_makes_the_norm_bad(bad: float, shape: tuple[int, ...]) -> None:
    found = parameters([(4, 3)] * 14 + [shape], 0)
    assert found[-1].grad is not None
    found[-1].grad.view(-1)[-1] = bad
    norm = Buckets().of(found).norm()
    assert isinstance(norm, float)
    assert not math.isfinite(norm)


@pytest.mark.parametrize("value", [1e25, 1e-30])
def test_squares_outside_of_float32_are_measured_again(value: float) -> None:
    found = [nn.Parameter(torch.zeros(4, 3)) for _ in range(14)]
    for parameter in found:
        parameter.grad = torch.full((4, 3), value)
    gradients = Buckets().of(found)
    assert gradients.norm() in (0.0, math.inf)
    assert gradients.exact_norm() == pytest.approx(value * math.sqrt(168), rel=1e-6)


def test_mixed_dtypes_strides_and_sparse_gradients_are_measured_and_changed() -> None:
    found: list[nn.Parameter] = [nn.Parameter(torch.zeros(4, 3, dtype=torch.float64)) for _ in range(14)]
    found += [nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(3, 4, 5, 6))]
    found += [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)), nn.Parameter(torch.zeros(10, 3))]
    for parameter in found[:-1]:
        parameter.grad = torch.randn_like(parameter)
    found[15].grad = torch.randn(3, 5, 6, 4).permute(0, 3, 1, 2)
    rows = torch.tensor([[1, 1, 4]])
    found[-1].grad = torch.sparse_coo_tensor(rows, torch.ones(3, 3), (10, 3), check_invariants=True)
    expected = math.sqrt(
        sum(float(p.grad.abs().double().square().sum()) for p in found[:-1] if p.grad is not None) + 3 * (4 + 1)
    )
    gradients = Buckets().of(found)
    assert gradients.norm() == pytest.approx(expected, rel=1e-6)  # row 1 is named twice: 2, not twice 1
    gradients.multiply(0.25)
    assert Buckets().of(found).norm() == pytest.approx(expected / 4, rel=1e-6)
    found[-2].grad = None  # complex: there is no order between its numbers
    Buckets().of(found).clamp(0.1)
    assert found[-1].grad is not None
    assert float(found[-1].grad.to_dense().max()) == pytest.approx(0.1)


def test_a_gradient_that_becomes_sparse_is_still_measured() -> None:
    found = parameters([(4, 3)] * 14, 0)
    buckets = Buckets()
    buckets.of(found).norm()
    dense = [p.grad.clone() for p in found if p.grad is not None]
    found[2].grad = dense[2].to_sparse(1)
    gradients = buckets.of(found)
    assert gradients.norm() == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in dense)), rel=1e-6)
    gradients.multiply(2.0)
    assert found[2].grad is not None
    torch.testing.assert_close(found[2].grad.to_dense(), 2 * dense[2])


def test_other_experts_in_each_step_are_each_measured() -> None:
    buckets = Buckets()
    for step in range(40):
        found = parameters([(4, 3), (5, 3), (7,), (9,), (300, 300)] * 14, step, without={step % 10, (3 * step) % 10})
        assert buckets.of(found).norm() == pytest.approx(norm_in_float64(found), rel=1e-5)


class Linear(nn.Module):
    """One weight whose gradient is the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


@pytest.mark.parametrize(
    ("clip", "update"),
    [
        (None, [3.0, -4.0, 0.0]),
        (1.0, [0.6, -0.8, 0.0]),
        (("norm", 2.5), [1.5, -2.0, 0.0]),
        (("value", 1.0), [1.0, -1.0, 0.0]),
        (10, [3.0, -4.0, 0.0]),
        (math.inf, [3.0, -4.0, 0.0]),
    ],
)
def test_clip_limits_the_norm_or_each_value(clip: object, update: list[float]) -> None:
    model = Linear()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1.0), clip=clip, on_nonfinite="skip")  # pyright: ignore[reportArgumentType]
    result = step([torch.tensor([3.0, -4.0, 0.0])], model)
    torch.testing.assert_close(-model.weight.detach(), torch.tensor(update), rtol=1e-5, atol=1e-7)
    assert result.grad_norm == pytest.approx(5.0)
    assert result.clipped == (clip in (1.0, ("norm", 2.5)))


def test_clipping_is_over_all_optimizers_and_once_for_all_microbatches() -> None:
    a, b = Linear(), Linear()
    optimizers = [torch.optim.SGD(a.parameters(), lr=1.0), torch.optim.SGD(b.parameters(), lr=1.0)]
    step = gradctl.Step([a, b], optimizers, accumulate=2, clip=1.0, items=lambda _: 1)
    parts = [torch.tensor([6.0, 0.0, 0.0]), torch.tensor([0.0, 8.0, 0.0])]
    result = step(parts, lambda x: a(x) + b(x) * 0)  # gradient of a: [3, 4, 0], of b: 0
    assert result.grad_norm == pytest.approx(5.0)
    torch.testing.assert_close(-a.weight.detach(), torch.tensor([0.6, 0.8, 0.0]), rtol=1e-5, atol=1e-7)


def test_an_uneven_step_is_clipped_by_its_own_norm() -> None:
    model = Linear()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1.0), accumulate=4, clip=1.0)
    step.backward(model(torch.tensor([3.0, 4.0, 0.0])), items=2)
    result = step.flush()  # expected 8 items, got 2
    assert result is not None
    assert result.grad_norm == pytest.approx(5.0)
    torch.testing.assert_close(-model.weight.detach(), torch.tensor([0.6, 0.8, 0.0]), rtol=1e-5, atol=1e-7)


def test_without_clip_and_policy_nothing_is_measured() -> None:
    model = Linear()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1.0), on_nonfinite="continue")
    assert step([torch.ones(3)], model).grad_norm is None
