"""What custom gradients and `backward_with` refuse, each by its sentence; and what `backward_with` does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl

X = torch.tensor([0.5, -1.5], requires_grad=True)
INTS = torch.tensor([1, 2])
learnt = torch.tensor(0.1, requires_grad=True)


def rounds_in_place(x: Tensor) -> Tensor:
    return x.round_()


def learnt_step(x: Tensor) -> Tensor:
    return torch.round(x / learnt) * learnt


REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: gradctl.stop(3.0), "stop: x is of type float and holds no tensor"),
    (lambda: gradctl.stop({"n": 1}), "stop: x is of type dict and holds no tensor"),
    (lambda: gradctl.scale(INTS, 0.5), "scale: x is of int64, which has no gradient"),
    (lambda: gradctl.scale((X, {"mask": INTS}), 0.5), "scale: x[1]['mask'] is of int64, which has no gradient"),
    (lambda: gradctl.scale((X, "a"), 0.5), "scale: x[1] is of type str, not a tensor"),
    (lambda: gradctl.scale([], 0.5), "scale: x is of type list and holds no tensor"),
    (lambda: gradctl.scale(X, math.nan), "scale: s=nan"),
    (lambda: gradctl.scale(X, math.inf), "scale: s=inf"),
    (lambda: gradctl.scale(X, "1"), "scale: s='1' is not a number"),
    (lambda: gradctl.scale(X, 1j), "scale: s=1j is not a number"),
    (lambda: gradctl.scale(X, learnt), "scale: s requires a gradient, and would get none"),
    (lambda: gradctl.scale(X, torch.tensor(1j)), "scale: s is complex"),
    (
        lambda: gradctl.scale(X, torch.ones(3, 2)),
        "scale: a factor of shape [3, 2] does not broadcast to x of shape [2]",
    ),
    (lambda: gradctl.scale(X, torch.ones(2, device="meta")), "scale: the factor is on meta, x on cpu"),
    (lambda: gradctl.reverse(INTS), "reverse: x is of int64, which has no gradient"),
    (lambda: gradctl.reverse(X, -0.5), "reverse: strength=-0.5 is negative"),
    (lambda: gradctl.reverse(X, math.inf), "reverse: strength=inf"),
    (lambda: gradctl.reverse(X, learnt), "reverse: strength requires a gradient, and would get none"),
    (lambda: gradctl.clip(X), "clip: give norm or value"),
    (lambda: gradctl.clip(X, norm=1.0, value=1.0), "clip: norm and value are both given"),
    (lambda: gradctl.clip(X, norm=0.0), "clip: norm=0.0 is not above 0"),
    (lambda: gradctl.clip(X, norm=-1), "clip: norm=-1.0 is not above 0"),
    (lambda: gradctl.clip(X, value=0), "clip: value=0.0 is not above 0"),
    (lambda: gradctl.clip(X, norm=math.nan), "clip: norm=nan"),
    (lambda: gradctl.clip(X, norm=math.inf), "clip: norm=inf"),
    (lambda: gradctl.clip(X, value=True), "clip: value=True is not a number"),
    (lambda: gradctl.clip(X, value=1.0, per="sample"), "clip: per='sample' with value"),
    (lambda: gradctl.clip(X, norm=1.0, per="row"), "clip: per='row'"),  # pyright: ignore
    (lambda: gradctl.clip(torch.tensor(1.0), norm=1.0, per="sample"), "clip: x has no dim, so it has no samples"),
    (lambda: gradctl.clip(INTS, norm=1.0), "clip: x is of int64, which has no gradient"),
    (lambda: gradctl.clip([X], norm=1.0), "clip: x is of type list, not a tensor"),  # pyright: ignore
    (lambda: gradctl.straight_through(torch.round, INTS), "straight_through: x is of int64, which has no gradient"),
    (lambda: gradctl.straight_through(1, X), "straight_through: the first argument is of type int"),  # pyright: ignore
    (lambda: gradctl.straight_through(torch.sum, X), "straight_through: quantised has shape [], x has [2]"),
    (
        lambda: gradctl.straight_through(lambda x: x.round().to(torch.int8), X),
        "straight_through: quantised is of int8, which has no gradient",
    ),
    (
        lambda: gradctl.straight_through(lambda x: x.half(), X),
        "straight_through: quantised has dtype float16, x has float32",
    ),
    (lambda: gradctl.straight_through(lambda x: 3, X), "straight_through: quantised is of type int, not a tensor"),
    (
        lambda: gradctl.straight_through(rounds_in_place, X * 1),
        "straight_through: rounds_in_place changed x in place",
    ),
    (
        lambda: gradctl.straight_through(learnt_step, X),
        "straight_through: learnt_step depends on something that requires a gradient, which would be lost",
    ),
    (lambda: gradctl.straight_through(torch.sign, X, backward="clip"), "straight_through: backward='clip'"),
    (
        lambda: gradctl.straight_through(torch.sign, X, bounds=(0, 1)),
        "straight_through: bounds without backward='clipped'",
    ),
    (
        lambda: gradctl.straight_through(torch.sign, X, backward="clipped", bounds=(1, 0)),
        "straight_through: bounds=(1, 0) hold nothing",
    ),
    (
        lambda: gradctl.straight_through(torch.sign, X, backward="clipped", bounds=(1, math.nan)),
        "straight_through: bounds=(1, nan) hold nothing",
    ),
    (
        lambda: gradctl.straight_through(torch.sign, X, backward="clipped", bounds=(1,)),
        "straight_through: bounds=(1,)",
    ),
    (
        lambda: gradctl.straight_through(torch.sign, X, backward=torch.sum),
        "straight_through: quantised has shape [2], backward(x) has []",
    ),
    (lambda: gradctl.replace(torch.ones(3), gradient_of=X), "replace: value has shape [3], gradient_of has [2]"),
    (
        lambda: gradctl.replace(torch.ones(2).double(), gradient_of=X),
        "replace: value has dtype float64, gradient_of has float32",
    ),
    (
        lambda: gradctl.replace(torch.ones(2, device="meta"), gradient_of=X),
        "replace: value has device meta, gradient_of has cpu",
    ),
    (lambda: gradctl.replace(INTS, gradient_of=X), "replace: value is of int64, which has no gradient"),
    (lambda: gradctl.replace(X.detach(), gradient_of=INTS), "replace: gradient_of is of int64, which has no gradient"),
    (lambda: gradctl.backward_with(X * 1, torch.ones(1)), "backward_with: grads has shape [1], outputs has [2]"),
    (
        lambda: gradctl.backward_with(X * 1, torch.ones(2).double()),
        "backward_with: grads has dtype float64, outputs has float32",
    ),
    (
        lambda: gradctl.backward_with([X * 1, X * 2], [torch.ones(2)]),
        "backward_with: 2 outputs and 1 gradient",
    ),
    (
        lambda: gradctl.backward_with([X * 1, X * 2], [torch.ones(2), None]),
        "backward_with: grads[1] is None",
    ),
    (
        lambda: gradctl.backward_with({"a": X * 1}, {"b": torch.ones(2)}),
        "backward_with: outputs and grads have different structures",
    ),
    (lambda: gradctl.backward_with([], []), "backward_with: outputs holds no tensor"),
    (
        lambda: gradctl.backward_with([X * 1, X.detach()], [torch.ones(2)] * 2),
        "backward_with: outputs[1] requires no gradient",
    ),
    (lambda: gradctl.backward_with(INTS, INTS), "backward_with: outputs is of int64, which has no gradient"),
    (
        lambda: gradctl.backward_with(X * 1, torch.ones(2), inputs=[]),
        "backward_with: inputs is empty",
    ),
    (
        lambda: gradctl.backward_with(X * 1, torch.ones(2), inputs=[X, X.detach()]),
        "backward_with: inputs[1] requires no gradient",
    ),
]


@pytest.mark.parametrize(("call", "headline"), REFUSALS, ids=[headline for _, headline in REFUSALS])
def test_it_is_refused_by_name_and_with_a_way_out(call: Callable[[], Any], headline: str) -> None:
    with pytest.raises(gradctl.UsageError) as caught:
        call()
    assert caught.value.headline == headline
    assert caught.value.fix
    assert X.grad is None


def test_a_sparse_gradient_is_not_clipped_by_the_sizes_of_its_parts() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    for how in ({"norm": 1.0}, {"value": 1.0}):
        out = nn.functional.embedding(torch.tensor([1, 1]), gradctl.clip(table, **how), sparse=True)
        with pytest.raises(gradctl.UsageError, match=re.escape("the gradient is sparse (torch.sparse_coo)")):
            out.sum().backward()


def test_a_sparse_gradient_is_scaled() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    nn.functional.embedding(torch.tensor([1, 1]), gradctl.scale(table, 0.5), sparse=True).sum().backward()
    assert table.grad.is_sparse
    assert table.grad.to_dense().tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


# -- backward_with ----------------------------------------------------------------------------------------------------


def test_backward_with_gives_what_a_made_up_loss_gives() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    g = torch.randn(5, 2)
    gradctl.backward_with(model(x), g)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(x) * g).sum().backward()
    for one, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_backward_with_adds_to_what_is_there_and_to_the_inputs_alone_when_asked() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    a.grad = torch.ones(2)
    gradctl.backward_with({"sum": a + b, "two": [2 * a]}, {"sum": torch.ones(2), "two": [torch.ones(2)]}, inputs=a)
    assert a.grad.tolist() == [4, 4]
    assert b.grad is None


def test_backward_with_takes_a_list_for_a_tuple() -> None:
    x = torch.ones(2, requires_grad=True)
    gradctl.backward_with((x * 1, x * 2), [torch.ones(2), torch.ones(2)])
    assert x.grad.tolist() == [3, 3]


def test_backward_with_fires_each_hook_once_and_frees_the_graph() -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    h = x.exp()
    h.register_hook(lambda g: seen.append(g.clone()))
    out = [h * 1, h * 2]
    gradctl.backward_with(out, [torch.ones(2)] * 2)
    assert [g.tolist() for g in seen] == [[3, 3]]
    with pytest.raises(RuntimeError, match="second time"):
        gradctl.backward_with(out, [torch.ones(2)] * 2)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_backward_with_create_graph_can_be_differentiated() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    y = x**3
    gradctl.backward_with(y, torch.ones(1), create_graph=True)
    (second,) = torch.autograd.grad(x.grad.sum(), x)
    x.grad = None
    assert second.item() == 12.0
    (kept,) = torch.autograd.grad(y, x)
    assert kept.item() == 12.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_backward_with_takes_any_floating_dtype(dtype: torch.dtype) -> None:
    x = torch.ones(2, dtype=dtype, requires_grad=True)
    gradctl.backward_with(x * 2, torch.full((2,), 3, dtype=dtype))
    assert torch.equal(x.grad, torch.full((2,), 6, dtype=dtype))


def test_backward_with_reaches_through_a_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.tensor([0.5], requires_grad=True)
    gradctl.backward_with(checkpoint(torch.sin, x, use_reentrant=False), torch.tensor([2.0]))
    torch.testing.assert_close(x.grad, 2 * x.detach().cos())


def test_backward_with_in_a_block_without_gradients_walks_the_graph_that_is_there() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x * 3
    with torch.no_grad():
        gradctl.backward_with(y, torch.ones(2))
    assert x.grad.tolist() == [3, 3]
