"""Regions that are run again: the plain program's gradients, buffers and traces, or an error that says why."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradctl import StaleSource
from gradctl._errors import UsageError
from gradctl._recompute import recompute
from gradctl._recompute._bits import bits_of
from hazards_recompute import LARGE, SMALL, Size
from hazards_recompute_more import HAZARDS
from test_recompute_hazards import Regions, plainly, run, same

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")


class Rerun(Regions):
    """As `Regions`, with the engine that runs the function again."""

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if self.call == len(self.made):
            self.made.append(recompute(lambda *a, **k: None, verify=self.verify, engine="rerun"))
        region = self.made[self.call]
        self.call += 1
        region.function = function
        return region(*args, **kwargs)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", HAZARDS)
def test_no_program_gets_another_gradient_without_an_error(name: str, size: Size) -> None:
    plain = run(HAZARDS[name].build, size, plainly)
    try:
        ours = run(HAZARDS[name].build, size, Rerun("full"))
    except (StaleSource, UsageError):
        return
    for expected, outcome in zip(plain, ours, strict=True):
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, StaleSource), f"{outcome!r}"
            assert outcome.fix
            return  # what later steps begin from is not what it would have been
        assert same(expected, outcome)


def gradients(
    module: nn.Module, x: Tensor, engine: Literal["tape", "rerun"] | None, verify: Any = "full"
) -> tuple[list[Tensor], list[Tensor]]:
    module = copy.deepcopy(module)
    if engine is not None:
        recompute(module, engine=engine, verify=verify)
    torch.manual_seed(1)
    for _ in range(3):
        module(x).pow(2).sum().backward()
    return [p.grad for p in module.parameters() if p.grad is not None], list(module.buffers())


def equal(one: Any, other: Any) -> bool:
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(one, other, strict=True))


class Codebook(nn.Module):
    """A buffer above what is copied each time, which moves in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("codes", torch.zeros(400, 16))
        self.register_buffer("table", torch.randn(400, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        with torch.no_grad():
            self.codes.mul_(0.9).add_(y.mean(0))
        return (y @ self.codes.clone().T + self.table.sum()).tanh()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, 2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize("verify", ["full", "sample", "off"])
@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, 8)),
        nn.Sequential(nn.BatchNorm1d(16), nn.RReLU()),
        Codebook(),
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
    ],
    ids=["batch norm", "rrelu", "codebook", "spectral norm"],
)
def test_gradients_and_buffers_are_those_of_the_plain_module(module: nn.Module, verify: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, requires_grad=True)
    assert equal(gradients(module, x, "rerun", verify), gradients(module, x, None))


def test_the_fused_lstm_is_run_again_with_its_dropout() -> None:
    x = torch.randn(5, 3, 16, requires_grad=True)
    module = Recurrent()
    assert equal(gradients(module, x, "rerun"), gradients(module, x, None))


def test_half_precision_complex_and_empty_tensors_are_told_apart_and_made_again() -> None:
    weight = nn.Parameter(torch.randn(8, 8))

    def region(x: Tensor) -> Tensor:
        half = (x @ weight).to(torch.bfloat16).tanh().float()
        return (torch.fft.rfft(half).abs() + 1).log().sum() + half[:0].exp().sum()

    found = []
    for function in (region, recompute(region, engine="rerun")):
        weight.grad = None
        function(torch.ones(4, 8)).backward()
        found.append(weight.grad)
    assert torch.equal(*found)


def test_rows_in_another_order_have_other_bits() -> None:
    x = torch.arange(64 * 128, dtype=torch.float32).reshape(64, 128)
    for order in (torch.arange(63, -1, -1), torch.arange(64).roll(1), torch.arange(64) ^ 1):
        assert bits_of([(1, x)], "full") != bits_of([(1, x[order])], "full")
        assert bits_of([(1, x)], "full") != bits_of([(1, x[:, torch.arange(127, -1, -1)])], "full")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int64, torch.uint8]
)
def test_one_changed_bit_anywhere_is_seen(dtype: torch.dtype) -> None:
    for shape in ((3,), (7, 5), (300, 130)):
        x = torch.zeros(*shape, dtype=torch.bool).to(dtype)
        if dtype is torch.uint8 and len(shape) == 1:
            continue  # the workspace of the fused LSTM looks like this
        before = bits_of([(1, x)], "full")
        for place in (0, x.numel() // 2, x.numel() - 1):
            y = x.clone()
            y.view(-1)[place] = 1
            assert bits_of([(1, y)], "full") != before


def test_a_random_permutation_that_cannot_be_drawn_again_is_refused() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    drawn = iter([torch.arange(64), torch.arange(63, -1, -1)])

    def region(x: Tensor) -> Tensor:
        return (x[next(drawn)] @ weight).tanh()

    loss = recompute(region, engine="rerun")(torch.randn(64, 64)).sum()
    with pytest.raises(StaleSource, match="did not compute what it computed in the forward") as caught:
        loss.backward()
    assert caught.value.fix is not None
    assert 'engine="tape"' in caught.value.fix


def test_everything_that_draws_is_drawn_again_and_goes_on_as_if_it_had_not() -> None:
    generator, own = torch.Generator().manual_seed(3), random.Random(4)
    numpy = np.random.default_rng(5)

    def region(x: Tensor) -> Tensor:
        noise = torch.rand(8, generator=generator) + random.random() + np.random.rand() + own.random() + numpy.random()
        return F.dropout((x * noise).tanh(), 0.5).exp()

    found = []
    for function in (region, recompute(region, engine="rerun")):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        generator.manual_seed(3)
        own.seed(4)
        numpy.bit_generator.state = np.random.default_rng(5).bit_generator.state
        x = torch.ones(8, requires_grad=True)
        function(x).sum().backward()
        assert x.grad is not None
        found.append([x.grad, torch.rand(1), torch.rand(1, generator=generator)])
        found[-1] += [torch.tensor([random.random(), np.random.rand(), own.random(), numpy.random()])]
    assert all(map(torch.equal, *found))


def test_modes_of_the_forward_are_those_of_the_second_run() -> None:
    weight = nn.Parameter(torch.randn(8, 8))

    def region(x: Tensor) -> Tensor:
        return ((x @ weight).tanh() * torch.ones(8) / 3).exp()

    found = []
    for function in (region, recompute(region, engine="rerun")):
        weight.grad = None
        torch.set_default_dtype(torch.float64)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                loss = function(torch.ones(4, 8, dtype=torch.float32)).sum()
        finally:
            torch.set_default_dtype(torch.float32)
        loss.backward()
        assert torch.get_default_dtype() is torch.float32
        assert not torch.is_autocast_enabled("cpu")
        found.append(weight.grad)
    assert torch.equal(*found)


def test_lists_attributes_and_counters_change_once() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls, self.seen = 0, []

        def forward(self, x: Tensor, cache: dict[str, Any]) -> Tensor:
            self.calls += 1
            y = (self.linear(x) * self.calls).tanh()
            self.seen.append(y.sum())
            cache["last"] = self.calls
            return y.exp()

    module, cache = Counting(), {}
    with recompute(module, engine="rerun"):
        for _ in range(3):
            module(torch.randn(2, 4), cache).sum().backward()
    assert (module.calls, len(module.seen), cache) == (3, 3, {"last": 3})


def test_regions_nest_three_deep() -> None:
    weights = [nn.Parameter(torch.randn(8, 8) / 3) for _ in range(3)]

    def build(wrap: Any) -> Any:
        inner = wrap(lambda x: F.dropout((x @ weights[0]).tanh(), 0.3))
        middle = wrap(lambda x: inner((inner(x) @ weights[1]).sin()).exp())
        return wrap(lambda x: (middle(x) @ weights[2]).tanh())

    found = []
    for wrap in (lambda f: f, lambda f: recompute(f, engine="rerun")):
        for weight in weights:
            weight.grad = None
        torch.manual_seed(0)
        build(wrap)(torch.ones(4, 8)).sum().backward()
        found.append([weight.grad for weight in weights])
    assert all(map(torch.equal, *found))


def test_a_new_tensor_at_the_address_of_an_argument_that_is_gone_is_not_taken_for_it() -> None:
    weights = [nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2)]
    inner = recompute(lambda x: F.dropout((x @ weights[0]).tanh(), 0.3), engine="rerun")
    outer = recompute(lambda x: inner((inner(x) @ weights[1]).sin()).exp(), engine="rerun")
    odd: list[Tensor] = []
    for seed in range(300):
        odd = [torch.empty(seed % 37 + 1), *odd[:20]]  # so that addresses come round again
        found = []
        for region in (outer, lambda x: outer.function(x)):
            torch.manual_seed(seed)
            found.append(torch.autograd.grad(region(torch.ones(4, 8)).sum(), weights))
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("outer", ["tape", "rerun"])
def test_a_region_of_one_engine_stands_in_one_of_the_other(outer: Any) -> None:
    weight = nn.Parameter(torch.randn(8, 8) / 3)
    inner = recompute(lambda x: F.dropout((x @ weight).tanh(), 0.3), engine="rerun" if outer == "tape" else "tape")

    def region(x: Tensor) -> Tensor:
        return inner(inner(x).exp()).sin()

    found = []
    for function in (region, recompute(region, engine=outer)):
        for _ in range(2):
            weight.grad = None
            torch.manual_seed(0)
            function(torch.ones(4, 8)).sum().backward()
        found.append(weight.grad)
    assert torch.equal(*found)


def test_graphs_that_are_kept_and_second_derivatives() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    found = []
    for wrap in (lambda f: f, lambda f: recompute(f, engine="rerun")):
        weight.grad = None
        x = torch.ones(4, 8, requires_grad=True)
        y = wrap(lambda x: (x @ weight).tanh().sin())(x).sum()
        y.backward(retain_graph=True)
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        slope.pow(2).sum().backward()
        found.append([weight.grad, x.grad])
    assert all(map(torch.equal, *found))


def test_one_output_is_gone_back_from_and_then_the_other() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    found = []
    for wrap in (lambda f: f, lambda f: recompute(f, engine="rerun")):
        weight.grad = None
        one, other = wrap(lambda x: ((x @ weight).tanh(), (x @ weight.T).exp()))(torch.ones(4, 8))
        one.sum().backward()
        other.sum().backward()
        found.append(weight.grad)
    assert torch.equal(*found)


def test_inputs_that_the_region_overwrites_are_copied_once_that_is_known_and_refused_before() -> None:
    weight = nn.Parameter(torch.randn(16, 16))
    region = recompute(lambda x, twice: ((x.mul_(2) if twice else x) @ weight).tanh(), engine="rerun")
    region(torch.randn(400, 16), False).sum().backward()
    loss = region(torch.randn(400, 16), True).sum()
    with pytest.raises(StaleSource, match="changed in place by the region that began with it"):
        loss.backward()

    x = torch.randn(400, 16)
    found = []
    for function in (
        lambda x: (x.mul_(2) @ weight).tanh(),
        recompute(lambda x: (x.mul_(2) @ weight).tanh(), engine="rerun"),
    ):
        weight.grad = None
        y = x.clone()
        function(y).sum().backward()
        found.append((weight.grad, y))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_after_an_error_in_backward_the_state_is_what_it_was() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    factor = [1.0]
    region = recompute(lambda x: module(x * float(open_factor())).exp(), engine="rerun")

    def open_factor() -> float:
        return next(values)

    values = iter([1.0, 2.0])
    loss = region(torch.randn(8, 4, requires_grad=True)).sum()
    buffers, state = [b.clone() for b in module.buffers()], torch.get_rng_state()
    with pytest.raises(StaleSource):
        loss.backward()
    assert factor == [1.0]
    assert all(map(torch.equal, buffers, module.buffers()))
    assert torch.equal(state, torch.get_rng_state())


ALIVE: list[weakref.ref[Tensor]] = []


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        note(y)
        return y.sin().sum()


def note(tensor: Tensor) -> None:
    """Hold a weak reference where the region does not reach."""
    ALIVE.append(weakref.ref(tensor))


def test_dropped_tensors_are_freed_in_the_forward_and_again_after_backward() -> None:
    ALIVE.clear()
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(600, 600, requires_grad=True)
        module = Exponential()
        recompute(module, engine="rerun")
        loss = module(x)
        assert [reference() for reference in ALIVE] == [None]
        loss.backward()
        assert [reference() for reference in ALIVE] == [None, None]
    finally:
        gc.enable()


def test_a_module_under_rerun_can_be_copied_and_given_back() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    handle = recompute(module, engine="rerun")
    other = copy.deepcopy(module)
    handle.remove()
    assert "forward" not in vars(module)
    other(torch.randn(2, 4)).sum().backward()
    assert other[0].weight.grad is not None
    assert module[0].weight.grad is None


def test_policies_and_unknown_engines_are_refused() -> None:
    with pytest.raises(UsageError, match="keeps nothing"):
        recompute(nn.Linear(2, 2), engine="rerun", keep="matmul")
    with pytest.raises(UsageError, match='is not "tape" or "rerun"'):
        recompute(nn.Linear(2, 2), engine="fast")  # type: ignore[call-overload]
