"""Backward through regions: kept graphs, second derivatives, parts of a graph, errors midway, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradctl import StaleSource
from gradctl._recompute import recompute

Layers = tuple[nn.Parameter, nn.Parameter, Tensor]


def leaves() -> Layers:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(48, 48) / 7), nn.Parameter(torch.randn(48, 48) / 7), torch.randn(40, 48)


def same(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return len(ours) == len(plain) and all(map(torch.equal, ours, plain))


def runs_as_plain(program: Callable[[Callable[..., Any]], list[Tensor]]) -> list[bool]:
    """Run a program that wraps its regions with `wrap`: a new region, then learned ones; whether each was as plain."""
    plain = program(lambda function: function)
    made: list[Any] = []

    def wrap(function: Any) -> Any:
        call = next(calls)
        if call == len(made):
            made.append(recompute(function))
        made[call].function = function
        return made[call]

    found: list[bool] = []
    for _ in range(3):
        calls = iter(range(99))
        found.append(same(program(wrap), plain))
    return found


def test_a_kept_graph_gives_the_same_gradient_each_time() -> None:
    def program(wrap: Any) -> list[Tensor]:
        w, u, x = leaves()
        loss = wrap(lambda t: ((t @ w).tanh() @ u).sin())(x).sum()
        found = [g for _ in range(3) for g in torch.autograd.grad(loss, (w, u), retain_graph=True)]
        loss.backward()
        return [*found, w.grad, u.grad]

    assert runs_as_plain(program) == [True] * 3


def test_a_graph_that_was_used_up_is_refused_as_by_torch() -> None:
    w, _, x = leaves()
    loss = recompute(lambda t: (t @ w).tanh().sin())(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_second_and_third_derivatives_are_the_plain_ones() -> None:
    def program(wrap: Any) -> list[Tensor]:
        w, u, x = leaves()
        x.requires_grad_()
        y = wrap(lambda t: ((t @ w).tanh() @ u).sin().pow(3))(x).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        (first.sum() + second.pow(2).sum()).backward()
        return [first.detach(), second.detach(), w.grad, u.grad, x.grad]

    assert runs_as_plain(program) == [True] * 3


def test_a_region_over_a_gradient_penalty_is_the_plain_one() -> None:
    def program(wrap: Any) -> list[Tensor]:
        w, u, x = leaves()

        def penalty(t: Tensor) -> Tensor:
            t = t.detach().requires_grad_()
            (grad,) = torch.autograd.grad((t @ w).tanh().mul(t @ u).sum(), t, create_graph=True)
            return (grad.norm(dim=1) - 1).pow(2)

        wrap(penalty)(x).mean().backward()
        return [w.grad, u.grad]

    assert runs_as_plain(program) == [True] * 3


@pytest.mark.parametrize("keep", [False, True])
def test_one_output_then_the_other(keep: bool) -> None:
    def program(wrap: Any) -> list[Tensor]:
        w, u, x = leaves()
        a, b = wrap(lambda t: ((t @ w).tanh().exp(), (t @ u).sigmoid().sin()))(x)
        a.sum().backward(retain_graph=keep)
        first = w.grad.clone()
        del a
        b.sum().backward(retain_graph=keep)
        return [first, w.grad, u.grad]

    assert runs_as_plain(program) == [True] * 3


def test_backward_to_some_leaves_then_to_others() -> None:
    def program(wrap: Any) -> list[Tensor]:
        w, u, x = leaves()
        loss = wrap(lambda t: ((t @ w).tanh() @ u).sin())(x).sum()
        loss.backward(inputs=[u], retain_graph=True)
        loss.backward(inputs=[w])
        return [w.grad, u.grad]

    assert runs_as_plain(program) == [True] * 3


def test_backward_that_a_hook_stops_can_be_asked_for_again() -> None:
    def program(wrap: Any) -> list[Tensor]:
        w, u, x = leaves()
        calls: list[int] = []

        def stop(grad: Tensor) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise KeyError("stop")

        def forward(t: Tensor) -> Tensor:
            y = (t @ w).tanh()
            y.register_hook(stop)
            return (y.exp() @ u).sin()

        loss = wrap(forward)(x).sum()
        with pytest.raises(KeyError, match="stop"):
            loss.backward(retain_graph=True)
        w.grad = u.grad = None
        loss.backward()
        return [w.grad, u.grad]

    assert runs_as_plain(program) == [True] * 3


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    w, _, x = leaves()
    fails = True

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).tanh().sin()
        if fails:
            raise KeyError("midway")
        return y.exp()

    region = recompute(forward)
    for _ in range(2):
        with pytest.raises(KeyError, match="midway"):
            region(x)
    fails = False
    region(x).sum().backward()
    ours, w.grad = w.grad, None
    forward(x).sum().backward()
    assert torch.equal(ours, w.grad)


def test_a_call_that_raises_under_a_learned_plan_does_not_spoil_the_next() -> None:
    w, _, x = leaves()
    fails = False

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).tanh().sin()
        if fails:
            raise KeyError("midway")
        return y.exp()

    region = recompute(forward)
    region(x).sum().backward()
    fails = True
    with pytest.raises(KeyError, match="midway"):
        region(x)
    fails = False
    w.grad = None
    region(x).sum().backward()
    ours, w.grad = w.grad, None
    forward(x).sum().backward()
    assert torch.equal(ours, w.grad)


class _Spoils(torch.autograd.Function):
    """Overwrites what it saved, in its backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.mul_(grad)


def test_a_backward_that_overwrites_what_another_needs_is_refused_as_by_torch() -> None:
    w, _, x = leaves()

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).exp()
        return _Spoils.apply(y)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        forward(x).sum().backward()
    with pytest.raises(StaleSource, match="changed in place"):
        recompute(forward)(x).sum().backward()


def test_a_backward_that_overwrites_what_nobody_else_needs_is_the_plain_one() -> None:
    def program(wrap: Any) -> list[Tensor]:
        w, _, x = leaves()
        wrap(lambda t: _Spoils.apply((t @ w) * 2))(x).sum().backward()
        return [w.grad]

    assert runs_as_plain(program) == [True] * 3


def test_two_threads_train_two_models_at_once() -> None:
    def train(seed: int, wrap: Any, out: dict[int, list[Tensor]]) -> None:
        generator = torch.Generator().manual_seed(seed)
        w = nn.Parameter(torch.randn(48, 48, generator=generator) / 7)
        x = torch.randn(40, 48, generator=generator)

        def forward(t: Tensor) -> Tensor:
            mask = torch.empty_like(t).bernoulli_(0.5, generator=generator)
            return ((t @ w).tanh() * mask).sin()

        region = wrap(forward)
        for _ in range(15):
            region(x).sum().backward()
            with torch.no_grad():
                w -= 0.01 * w.grad
            w.grad = None
        out[seed] = [w.detach()]

    plain: dict[int, list[Tensor]] = {}
    for seed in range(2):
        train(seed, lambda f: f, plain)
    ours: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=train, args=(seed, recompute, ours)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ours.keys() == plain.keys()
    for seed, found in plain.items():
        assert same(ours[seed], found)


class _Watches(TorchDispatchMode):
    """Looks at the default generator while a mask is made again."""

    sees_replay = True

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "bernoulli" in str(func):
            self.states.append(torch.get_rng_state())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("draw", [lambda t: torch.dropout(t, 0.5, True), lambda t: t + torch.bernoulli(t.sigmoid())])
def test_replay_does_not_disturb_what_another_thread_draws(draw: Any) -> None:
    # The default generator belongs to all threads; making a mask again must not set it back, not for a moment.
    w, _, x = leaves()
    loss = recompute(lambda t: draw(t @ w).pow(2))(x).sum()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with _Watches() as seen:
        loss.backward()
    assert len(seen.states) == 1
    assert torch.equal(seen.states[0], before)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_region_called_by_two_threads_is_right_in_both() -> None:
    w, _, x = leaves()
    region = recompute(lambda t: (t @ w).tanh().sin())
    (plain,) = torch.autograd.grad((x @ w).tanh().sin().sum(), w)
    found: list[Tensor] = []

    def call() -> None:
        for _ in range(10):
            found.extend(torch.autograd.grad(region(x).sum(), w))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(torch.equal(grad, plain) for grad in found)


def test_backward_in_another_thread_than_the_forward() -> None:
    w, _, x = leaves()
    loss = recompute(lambda t: torch.dropout((t @ w).tanh(), 0.5, True).sin())(x).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    ours = w.grad
    torch.manual_seed(0)
    w, _, x = leaves()
    torch.dropout((x @ w).tanh(), 0.5, True).sin().sum().backward()
    assert torch.equal(ours, w.grad)
