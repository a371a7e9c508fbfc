"""`gradctl.check` names the tensor whose gradient is wrong, and how it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl

Grads = tuple[Tensor | None, ...]


def linear(change: Callable[[Tensor, Tensor, Tensor], Grads]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A linear layer with a backward of its own, changed."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w.T + b

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Grads:
            x, w = ctx.saved_tensors
            return change(g @ w, g.T @ x, g.sum(0))

    return lambda x, w, b: Linear.apply(x, w, b)


def inputs(seed: int, *, rows: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(8, 16), torch.randn(rows, 16), torch.randn(rows)


def at(w: Tensor, index: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Tensor:
    w = w.clone()
    w[index] = change(w[index])
    return w


FAULTS: dict[str, tuple[str, str, Callable[[Tensor, Tensor, Tensor], Grads]]] = {
    "factor 2": ("w", "factor", lambda x, w, b: (x, 2 * w, b)),
    "wrong sign": ("x", "factor", lambda x, w, b: (-x, w, b)),
    "mean for sum": ("b", "factor", lambda x, w, b: (x, w, b / 8)),
    "transposed": ("w", "transposed", lambda x, w, b: (x, w.T.contiguous(), b)),
    "None": ("b", "none", lambda x, w, b: (x, w, None)),
    "zeros": ("b", "missing-term", lambda x, w, b: (x, w, 0 * b)),
    "1 % off": ("w", "factor", lambda x, w, b: (x, 1.01 * w, b)),
    "a term is missing": ("x", "missing-term", lambda x, w, b: (x - x.roll(1, 0), w, b)),
    "1e-5 relative": ("w", "factor", lambda x, w, b: (x, (1 + 1e-5) * w, b)),
    "sign of one element": ("w", "elements", lambda x, w, b: (x, at(w, (3, 7), torch.neg), b)),
    "one element of 256 is 1 % off": ("w", "elements", lambda x, w, b: (x, at(w, (3, 7), lambda e: 1.01 * e), b)),
    "NaN": ("x", "nonfinite", lambda x, w, b: (at(x, (0, 0), lambda e: e * torch.nan), w, b)),
    "noise of 1e-6": ("w", "non-determinism", lambda x, w, b: (x, w + 1e-6 * torch.randn_like(w), b)),
    "cast to bfloat16": ("x", "float32", lambda x, w, b: (x.bfloat16().to(x.dtype), w, b)),
}


def found(fault: str, seed: int) -> list[tuple[tuple[str, ...], str]]:
    return [(f.parameters, f.slug) for f in gradctl.check(linear(FAULTS[fault][2]), inputs(seed), seed=seed)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_named_and_classified_at_each_of_three_seeds(fault: str) -> None:
    name, slug, _ = FAULTS[fault]
    for seed in range(3):
        assert found(fault, seed) == [((name,), slug)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_at_no_fewer_than_49_of_50_seeds(fault: str) -> None:
    name, slug, _ = FAULTS[fault]
    assert sum(found(fault, seed) == [((name,), slug)] for seed in range(50)) >= 49


def test_a_right_backward_gives_nothing() -> None:
    assert gradctl.check(linear(lambda x, w, b: (x, w, b)), inputs(0)) == []


def test_the_elements_that_are_wrong_are_told_by_index() -> None:
    (finding,) = gradctl.check(linear(FAULTS["one element of 256 is 1 % off"][2]), inputs(0))
    assert "wrong in 1 of 256 elements: [3, 7]" in finding.symptom
    assert finding.severity == "error"


def test_the_factor_is_told_as_a_person_says_it() -> None:
    (finding,) = gradctl.check(linear(FAULTS["mean for sum"][2]), inputs(0))
    assert "the gradient of b is 1/8 of the derivative" in finding.symptom
    assert finding.measured is not None
    assert finding.measured["factor"] == pytest.approx(1 / 8)
    (finding,) = gradctl.check(linear(FAULTS["wrong sign"][2]), inputs(0))
    assert "-1 times the derivative" in finding.symptom
    assert "sign" in finding.why


def test_the_finding_points_at_the_backward_of_the_only_custom_function() -> None:
    (finding,) = gradctl.check(linear(FAULTS["factor 2"][2]), inputs(0))
    assert finding.primary is not None
    assert finding.primary.file == __file__
    assert "def backward" in Path(__file__).read_text(encoding="utf-8").splitlines()[finding.primary.line - 1]


def test_a_transposed_gradient_that_went_through_a_reshape_is_told_for_a_matrix_that_is_not_square() -> None:
    fn = linear(lambda x, w, b: (x, w.T.reshape(w.shape), b))
    assert [(f.parameters, f.slug) for f in gradctl.check(fn, inputs(1, rows=5))] == [(("w",), "transposed")]


def test_gradients_in_the_wrong_order_are_told_as_swapped() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a.sin() * b

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Grads:
            a, b = ctx.saved_tensors
            return g * a.sin(), g * a.cos() * b

    torch.manual_seed(0)
    (finding,) = gradctl.check(lambda a, b: Product.apply(a, b), (torch.randn(4), torch.randn(4)))
    assert (finding.slug, finding.parameters) == ("swapped", ("a", "b"))
    assert "the derivative is what b got" in finding.symptom or "the derivative is what a got" in finding.symptom


def test_a_missing_conjugate_is_told() -> None:
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor, a: Tensor) -> Tensor:
            ctx.save_for_backward(z, a)
            return z * a

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Grads:
            z, a = ctx.saved_tensors
            return g * a, g * z.conj()

    torch.manual_seed(0)
    z, a = torch.randn(2, 5, dtype=torch.complex64)
    findings = gradctl.check(lambda z, a: Times.apply(z, a), (z, a))
    assert [f.parameters for f in findings] == [("z",)]


# -- what torch accepts without a word ------------------------------------------------------------------------------


def one_input(backward: Callable[[Any, Tensor, Tensor], Tensor | None]) -> Callable[[Tensor], Tensor]:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            ctx.x = x
            return x * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor | None:
            return backward(ctx, g, ctx.saved_tensors[0])

    return lambda x: Square.apply(x)


@pytest.mark.parametrize(
    ("backward", "slug"),
    [
        (lambda ctx, g, x: (2 * x * g).expand(2, 3), "factor"),  # summed to the shape of the input
        (lambda ctx, g, x: (2 * x * g).bfloat16(), "float32"),  # cast to its dtype
        (lambda ctx, g, x: None, "none"),
    ],
    ids=["summed silently", "cast silently", "None"],
)
def test_a_row_that_torch_accepts_silently_is_found_and_names_its_argument(backward: Any, slug: str) -> None:
    torch.manual_seed(0)
    (finding,) = gradctl.check(one_input(backward), torch.randn(3))
    assert (finding.slug, finding.parameters) == (slug, ("x",))


def test_a_tensor_kept_as_an_attribute_and_changed_in_place_afterwards_is_found() -> None:
    square = one_input(lambda ctx, g, x: 2 * ctx.x * g)

    def fn(x: Tensor) -> Tensor:
        y = x + 0
        out = square(y)
        with torch.no_grad():
            y.data.mul_(0.07)
        return out

    torch.manual_seed(0)
    findings = gradctl.check(fn, torch.randn(3))
    assert [f.parameters for f in findings] == [("x",)]


def test_a_penalty_without_create_graph_is_found_for_each_parameter_that_it_concerns() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss(x: Tensor) -> Tensor:
        slope = torch.autograd.grad(critic(x).sum(), x, retain_graph=True)[0]
        return critic(x).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    findings = gradctl.check(loss, torch.randn(5, 3))
    named = {name for finding in findings for name in finding.parameters}
    assert {"0.weight", "0.bias", "2.weight"} <= named
    assert "2.bias" not in named  # no penalty by it


def test_a_detached_part_of_a_model_is_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).detach().tanh())

    torch.manual_seed(0)
    (finding,) = gradctl.check(Net(), torch.randn(5, 3))
    assert finding.slug == "none"
    assert finding.parameters == ("input", "body.weight", "body.bias") or finding.parameters[0] == "x"


def test_the_nan_of_a_square_root_behind_where_is_found() -> None:
    x = torch.tensor([0.0, 1.0, 2.0])
    (finding,) = gradctl.check(lambda x: torch.where(x > 0.5, (x * x).sqrt(), x), x)
    assert (finding.slug, finding.severity, finding.parameters) == ("nonfinite", "error", ("x",))


def test_the_nan_hypergradient_of_an_unrolled_adam_is_found() -> None:
    def inner(scale: Tensor) -> Tensor:
        w = torch.tensor([1.0, 2.0])
        grad = scale * torch.stack([w[0], w[1] * 0])  # one gradient is exactly zero
        return (w - 0.1 * grad / ((grad * grad).sqrt() + 1e-8)).square().sum()

    (finding,) = gradctl.check(inner, torch.tensor(0.7))
    assert (finding.slug, finding.parameters) == ("nonfinite", ("scale",))


def test_a_straight_through_gradient_is_told_as_constant_and_left_out_when_expected() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return w * (x + (x.round() - x).detach())

    torch.manual_seed(0)
    args = torch.randn(6) * 3, torch.randn(6)
    (finding,) = gradctl.check(fn, args)
    assert (finding.slug, finding.severity, finding.parameters) == ("piecewise-constant", "warning", ("x",))
    assert gradctl.check(fn, args, expected=["x"]) == []


def test_several_tensors_that_are_wrong_in_one_way_are_one_finding() -> None:
    (finding,) = gradctl.check(linear(lambda x, w, b: (3 * x, 3 * w, b)), inputs(0))
    assert (finding.slug, finding.parameters) == ("factor", ("x", "w"))
    findings = gradctl.check(linear(lambda x, w, b: (3 * x, 2 * w, b)), inputs(0))
    assert sorted(f.parameters for f in findings) == [("w",), ("x",)]


def test_a_small_gradient_beside_a_large_one_is_still_compared() -> None:
    fn = linear(lambda x, w, b: (1e-6 * x, w, b))
    assert gradctl.check(lambda x, w, b: fn(1e-6 * x, w, b), inputs(0)) != []
    right = linear(lambda x, w, b: (x, w, b))
    wrong = linear(lambda x, w, b: (-x, w, b))
    torch.manual_seed(0)
    tiny, args = torch.randn(8, 16), inputs(0)
    assert gradctl.check(lambda t, x, w, b: right(x, w, b) + 1e-7 * right(t, w, b), (tiny, *args)) == []
    (finding,) = gradctl.check(lambda t, x, w, b: right(x, w, b) + 1e-7 * wrong(t, w, b), (tiny, *args))
    assert (finding.slug, finding.parameters) == ("factor", ("t",))


def test_a_fault_deep_in_a_model_is_localised_to_what_lies_before_it() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g / 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(x).tanh()
                if i == 1:
                    x = Halved.apply(x)
            return x

    torch.manual_seed(0)
    (finding,) = gradctl.check(Net(), torch.randn(4, 6))
    assert finding.slug == "factor"
    assert finding.parameters == ("x", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias")
    assert "1/2 of the derivative" in finding.symptom


def test_a_result_prints_itself_with_the_numbers() -> None:
    text = str(gradctl.check(linear(FAULTS["factor 2"][2]), inputs(0)))
    assert "1 cause found in the gradients of" in text
    assert "the gradient of w is 2 times the derivative: along a random direction it gives" in text
    assert "affected  w" in text
