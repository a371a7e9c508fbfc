"""What a region holds: fewer bytes after forward, none after backward, and nothing that waits for the collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gradctl._recompute import recompute


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.1)) for _ in range(3)]
    return nn.Sequential(*layers)


def bytes_left_by(call: Callable[[], Any]) -> int:
    """Bytes that a call allocated and that are still there, told by torch's own allocator events."""
    kept: list[Any] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept.append(call())
    total = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
    del kept
    return total


def first_use() -> None:
    """Make what is made once in a process: weights of fingerprints, plans of libraries."""
    model = net()
    recompute(model)
    model(torch.randn(32, 64)).sum().backward()


pytestmark = pytest.mark.filterwarnings("ignore:.*(Profiler|kineto).*")


def test_nothing_is_left_after_backward_that_plain_torch_does_not_leave() -> None:
    first_use()
    x = torch.randn(256, 64)

    def step(model: nn.Module) -> None:
        model(x).sum().backward()

    plain = net()
    step(plain)
    ours = net()
    for layer in ours:
        recompute(layer)
    step(ours)  # learns
    assert bytes_left_by(lambda: step(ours)) == bytes_left_by(lambda: step(plain)) == 0


def test_nothing_is_left_of_a_forward_whose_loss_is_dropped() -> None:
    first_use()
    x, model = torch.randn(256, 64), net()
    for layer in model:
        recompute(layer)
    model(x)
    for _ in range(2):
        assert bytes_left_by(lambda: model(x).sum() and None) == 0


def test_less_is_alive_between_forward_and_backward() -> None:
    first_use()
    x = torch.randn(256, 64)
    plain, ours, matmul = net(), net(), net()
    for layer in ours:
        recompute(layer)
    for layer in matmul:
        recompute(layer, keep="matmul")
    for model in (plain, ours, matmul):
        model(x).sum().backward()
    size = x.nbytes
    # Each layer saves its input, the product, the normed values and the mask; of these only the inputs are left.
    assert bytes_left_by(lambda: plain(x).sum()) > 3 * 3 * size
    assert 2 * size <= bytes_left_by(lambda: ours(x).sum()) < 3 * size
    assert 5 * size <= bytes_left_by(lambda: matmul(x).sum()) < 6 * size


@pytest.mark.parametrize("learned", [False, True])
def test_a_saved_result_is_gone_as_soon_as_it_was_used(learned: bool) -> None:
    w = nn.Parameter(torch.randn(64, 64))
    alive: list[weakref.ref[Any]] = []
    at_the_end: list[int] = []

    def forward(x: Tensor) -> Tensor:
        y = (x @ w).tanh()
        alive.append(weakref.ref(y.untyped_storage()))
        return y.sin()

    region = recompute(forward)
    if learned:
        region(torch.randn(64, 64)).sum().backward()
        alive.clear()
    w.register_hook(lambda grad: at_the_end.append(sum(ref() is not None for ref in alive)))
    loss = region(torch.randn(64, 64)).sum()
    assert alive[0]() is None
    loss.backward()
    assert at_the_end == [0]


def test_an_input_dies_with_the_graph() -> None:
    w = nn.Parameter(torch.randn(64, 64))
    region = recompute(lambda x: (x @ w).tanh().sin())
    for _ in range(3):
        x = torch.randn(64, 64)
        ref = weakref.ref(x)
        loss = region(x).sum()
        loss.backward()
        del x
        assert ref() is None


def test_a_nested_region_leaves_nothing() -> None:
    first_use()
    model, x = net(), torch.randn(256, 64)
    for layer in model:
        recompute(layer)
    recompute(model)
    for _ in range(2):
        model(x).sum().backward()
    assert bytes_left_by(lambda: model(x).sum().backward()) == 0


def test_an_error_midway_leaves_nothing() -> None:
    first_use()
    w, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64)

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).tanh().sin()
        if y.shape[0] == 64:
            raise KeyError("midway")
        return y

    region = recompute(forward)

    def call() -> None:
        try:
            region(x)
        except KeyError:
            pass

    call()
    assert bytes_left_by(call) == 0


def test_a_model_dies_when_it_is_dropped() -> None:
    model = net()
    handle = recompute(model)
    model(torch.randn(4, 64)).sum().backward()
    ref = weakref.ref(model)
    handle.remove()
    del handle, model
    assert ref() is None
