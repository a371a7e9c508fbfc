"""Programs whose second run differs from the first: what a region must not do twice, or must refuse.

The first part are known hazards of running a function again in backward; the second are programs that such mechanisms
refuse or answer wrongly. Each is built anew for each run, and is asked for several steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Region = Callable[..., Any]
"""Called as `region(function, *args, **kwargs)`."""


@dataclass(frozen=True)
class Size:
    """How large the tensors of a program are: what is small is copied, what is large is held."""

    rows: int
    width: int

    def weight(self) -> nn.Parameter:
        return nn.Parameter(torch.randn(self.width, self.width) / self.width**0.5)

    def input(self) -> Tensor:
        return torch.randn(self.rows, self.width)


SMALL, LARGE = Size(4, 8), Size(40, 48)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Program:
    """One training program.

    Args:
        watched: leaves and modules whose gradients and buffers are compared.
        step: runs the forward and returns the loss.
        between: what happens between forward and backward.
        effects: other traces that the program leaves, as numbers.
    """

    watched: Sequence[Tensor | nn.Module]
    step: Callable[[Region], Tensor]
    between: Callable[[], Any] = _nothing
    effects: Callable[[], list[float]] = list


@dataclass(frozen=True)
class Hazard:
    """A program and what is expected of it.

    Args:
        build: makes it.
        refused: words of the error, where it cannot be right; None where gradients are the plain ones.
        only_large: it is refused where tensors are too large to copy, and right where they are small.
        unseen: it changes a tensor without a trace, which only a fingerprint sees.
    """

    build: Callable[[Size], Program]
    refused: str | None = None
    only_large: bool = False
    unseen: bool = False


HAZARDS: dict[str, Hazard] = {}
IN_PLACE = "was changed in place between forward and backward"
DIFFERS = "differs from the forward's"


def hazard(**expected: Any) -> Callable[[Callable[[Size], Program]], Callable[[Size], Program]]:
    def add(build: Callable[[Size], Program]) -> Callable[[Size], Program]:
        HAZARDS[build.__name__] = Hazard(build, **expected)
        return build

    return add


class World:
    scale = 1.0
    width = 4
    flag = True


# -- what Python does ------------------------------------------------------------------------------------------------


@hazard()
def dropout(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda x: F.dropout((x @ w).relu(), 0.5).pow(2), x).sum())


@hazard()
def dropout_of_products(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda x: F.dropout(x @ w, 0.5).pow(2), x).sum())


def _world(s: Size, function: Callable[[Tensor], Tensor], **later: Any) -> Program:
    w, x = s.weight(), s.input()

    def step(region: Region) -> Tensor:
        World.scale, World.width, World.flag = 1.0, 4, True
        return region(lambda x: function(x @ w), x).sum()

    return Program([w], step, lambda: [setattr(World, name, value) for name, value in later.items()])


@hazard()
def a_global_scalar_changes(s: Size) -> Program:
    return _world(s, lambda y: (y * World.scale).tanh(), scale=2.0)


@hazard()
def a_global_changes_the_width(s: Size) -> Program:
    return _world(s, lambda y: y[:, : World.width].tanh().sum(1), width=6)


@hazard()
def a_global_changes_the_branch(s: Size) -> Program:
    return _world(s, lambda y: y.tanh() if World.flag else y.sigmoid(), flag=False)


@hazard()
def a_branch_saves_fewer(s: Size) -> Program:
    return _world(s, lambda y: y.tanh().sin().exp() if World.flag else y.tanh(), flag=False)


@hazard()
def a_branch_saves_more(s: Size) -> Program:
    return _world(s, lambda y: y.tanh() if World.flag else y.tanh().sin().exp(), flag=False)


@hazard()
def only_the_output_changes(s: Size) -> Program:
    return _world(s, lambda y: y.tanh() * World.scale, scale=2.0)


@hazard()
def python_random(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda x: ((x @ w) * (1 + random.random())).tanh(), x).sum())


@hazard()
def layers_left_out_at_random(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program(
        [w],
        lambda region: region(lambda x: (x @ w).tanh() if random.random() < 0.5 else (x @ w.t()).tanh(), x).sum(),
    )


@hazard()
def numpy_random(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program(
        [w],
        lambda region: region(lambda x: (x @ w + torch.from_numpy(np.random.rand(*x.shape)).float()).tanh(), x).sum(),
    )


@hazard()
def a_generator_of_the_user(s: Size) -> Program:
    w, x, g = s.weight(), s.input(), torch.Generator().manual_seed(5)
    return Program(
        [w],
        lambda region: region(lambda x: ((x @ w) * torch.empty_like(x).bernoulli_(0.5, generator=g)).pow(2), x).sum(),
        effects=lambda: [float(g.get_state().sum())],
    )


@hazard()
def a_python_iterator(s: Size) -> Program:
    w, x = s.weight(), s.input()
    values = iter([s.input() for _ in range(9)])
    return Program([w], lambda region: region(lambda x: (x @ w + next(values)).tanh(), x).sum())


# -- state that moves ------------------------------------------------------------------------------------------------


@hazard()
def batch_norm_buffers(s: Size) -> Program:
    model, x = nn.Sequential(nn.Linear(s.width, s.width), nn.BatchNorm1d(s.width), nn.Tanh()), s.input()
    return Program([model], lambda region: region(model, x).sum())


@hazard()
def spectral_norm(s: Size) -> Program:
    model, x = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(s.width, s.width)), s.input()
    return Program([model], lambda region: region(lambda x: model(x).tanh(), x).sum())


class _Average(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        self.w = s.weight()
        self.register_buffer("mean", torch.zeros(s.rows, s.width))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        before = (y - self.mean).tanh()
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * y)
        return before * (y - self.mean.clone()).tanh()


@hazard()
def an_average_is_read_then_written(s: Size) -> Program:
    model, x = _Average(s), s.input()
    return Program([model], lambda region: region(model, x).sum())


@hazard()
def an_average_moves_in_two_calls(s: Size) -> Program:
    model, x = _Average(s), s.input()
    return Program([model], lambda region: (region(model, x) + region(model, x + 1)).sum())


class _Counts(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        self.w, self.calls = s.weight(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return ((x @ self.w) * self.calls).tanh()


@hazard()
def a_counter_in_the_forward(s: Size) -> Program:
    model, x = _Counts(s), s.input()
    return Program([model], lambda region: region(model, x).sum(), effects=lambda: [model.calls])


@hazard()
def a_list_of_auxiliary_losses(s: Size) -> Program:
    w, x, losses = s.weight(), s.input(), list[Tensor]()

    def forward(x: Tensor) -> Tensor:
        y = (x @ w).tanh()
        losses.append(y.pow(2).mean())
        return y.exp()

    def step(region: Region) -> Tensor:
        losses.clear()
        return region(forward, x).sum() + sum(losses)

    return Program([w], step, effects=lambda: [len(losses)])


@hazard()
def dropout_is_switched_off_before_backward(s: Size) -> Program:
    model, x = nn.Sequential(nn.Linear(s.width, s.width), nn.Dropout(0.5), nn.Tanh()), s.input()
    return Program([model], lambda region: region(model.train(), x).sum(), model.eval)


@hazard()
def batch_norm_is_switched_off_before_backward(s: Size) -> Program:
    model, x = nn.Sequential(nn.Linear(s.width, s.width), nn.BatchNorm1d(s.width), nn.Tanh()), s.input()
    return Program([model], lambda region: region(model.train(), x).sum(), model.eval)


@hazard()
def a_cache_that_is_appended_to(s: Size) -> Program:
    w, x, cache = s.weight(), s.input(), list[Tensor]()

    def attend(x: Tensor) -> Tensor:
        cache.append(x @ w)
        return torch.cat(cache).tanh()

    def step(region: Region) -> Tensor:
        cache.clear()
        return sum(region(attend, x * (i + 1)).sum() for i in range(3))

    return Program([w], step, effects=lambda: [len(cache)])


# -- tensors that are changed in place -------------------------------------------------------------------------------


@hazard(refused=IN_PLACE)
def the_input_is_changed_after(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda x: (x @ w).tanh(), x).sum(), lambda: x.add_(1))


@hazard(refused=IN_PLACE)
def a_keyword_is_changed_after(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda x: (x @ w).tanh(), x=x).sum(), lambda: x.add_(1))


@hazard(refused=IN_PLACE)
def a_tensor_in_a_list_is_changed_after(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda xs: (xs[0] @ w).tanh(), [x]).sum(), lambda: x.add_(1))


@hazard(refused=IN_PLACE, only_large=True)
def a_tensor_of_the_closure_is_changed_after(s: Size) -> Program:
    w, x, y = s.weight(), s.input(), s.input()
    return Program([w], lambda region: region(lambda x: (x @ w + y).tanh(), x).sum(), lambda: y.add_(1))


@hazard()
def the_input_is_changed_inside(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda x: (x.mul_(1.5) @ w).tanh(), x).sum())


@hazard()
def the_input_is_read_then_changed_inside(s: Size) -> Program:
    w, x = s.weight(), s.input()

    def forward(x: Tensor) -> Tensor:
        first = (x.exp() @ w).tanh()
        return first * (x.mul_(0.5) @ w).tanh()

    return Program([w], lambda region: region(forward, x).sum())


@hazard()
def a_scratch_tensor_is_changed_inside(s: Size) -> Program:
    w, x, scratch = s.weight(), s.input(), torch.zeros(s.rows, s.width)

    def forward(x: Tensor) -> Tensor:
        scratch.add_(1)
        return (x @ w + scratch.clone()).tanh()

    return Program([w], lambda region: region(forward, x).sum())


@hazard(refused=DIFFERS, only_large=True, unseen=True)
def a_parameter_is_stepped_through_data(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda x: (x @ w).tanh(), x).sum(), lambda: w.data.mul_(0.5))


@hazard(refused=DIFFERS, only_large=True, unseen=True)
def an_index_is_shuffled_without_a_trace(s: Size) -> Program:
    w, x, order = s.weight(), s.input(), torch.randperm(s.rows * s.width)

    def forward(x: Tensor) -> Tensor:
        return (x @ w).double().reshape(-1)[order].sin().pow(2)  # whole words change places

    return Program([w], lambda region: region(forward, x).sum(), lambda: np.random.shuffle(order.numpy()))


@hazard(refused=DIFFERS, only_large=True, unseen=True)
def a_sign_is_turned_without_a_trace(s: Size) -> Program:
    w, x, sign = s.weight(), s.input(), torch.ones(s.rows, s.width, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        y = (x @ w).double()
        return y * (y.detach() * sign)

    return Program([w], lambda region: region(forward, x).sum(), sign.data.neg_)


@hazard(refused=IN_PLACE, only_large=True)
def a_parameter_is_stepped_in_place(s: Size) -> Program:
    w, x = s.weight(), s.input()

    def update() -> None:
        with torch.no_grad():
            w.mul_(0.5)

    return Program([w], lambda region: region(lambda x: (x @ w).tanh(), x).sum(), update)


@hazard(refused=IN_PLACE)
def the_optimizer_steps_in_backward_what_an_earlier_region_read(s: Size) -> Program:
    w, u, x, grads = s.weight(), s.weight(), s.input(), list[float]()

    def update(p: Tensor) -> None:
        assert p.grad is not None
        grads.append(float(p.grad.double().sum()))
        with torch.no_grad():
            p.sub_(0.5 * p.grad)
        p.grad = None

    for p in (w, u):
        p.register_post_accumulate_grad_hook(update)

    def step(region: Region) -> Tensor:
        h = region(lambda x: ((x @ u) @ w.detach().t()).tanh(), x)
        return (h @ w).pow(2).mean()

    return Program([], step, effects=lambda: list(grads))


# -- contexts --------------------------------------------------------------------------------------------------------


@hazard()
def autocast_around_the_forward_only(s: Size) -> Program:
    w, x = s.weight(), s.input()

    def step(region: Region) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return region(lambda x: (x @ w).tanh(), x).float().sum()

    return Program([w], step)


@hazard()
def a_choice_of_attention_around_the_forward_only(s: Size) -> Program:
    w, x = s.weight(), torch.randn(2, 4, s.rows, s.width)

    def step(region: Region) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return region(lambda x: F.scaled_dot_product_attention(x @ w, x @ w, x), x).sum()

    return Program([w], step)


@hazard()
def a_default_dtype_around_the_forward_only(s: Size) -> Program:
    w, x = s.weight(), s.input()

    def step(region: Region) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return region(lambda x: ((x @ w).double() * torch.ones(s.width) / 3).tanh(), x).sum()
        finally:
            torch.set_default_dtype(torch.float32)

    return Program([w], step)


@hazard()
def a_library_is_switched_off_around_the_forward_only(s: Size) -> Program:
    conv, x = nn.Conv2d(3, 16, 3), torch.randn(4, 3, s.width, s.width)

    def step(region: Region) -> Tensor:
        torch.backends.mkldnn.enabled = False
        try:
            return region(lambda x: conv(x).tanh().sin(), x).sum()
        finally:
            torch.backends.mkldnn.enabled = True

    return Program([conv], step)


class _TanhBecomesSigmoid(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.sigmoid if func is torch.tanh else func)(*args, **(kwargs or {}))


@hazard()
def a_function_mode_around_the_forward_only(s: Size) -> Program:
    w, x = s.weight(), s.input()

    def step(region: Region) -> Tensor:
        with _TanhBecomesSigmoid():
            return region(lambda x: torch.tanh(x @ w), x).sum()

    return Program([w], step)


@hazard()
def rrelu_draws_without_saying_so(s: Size) -> Program:
    w, x = s.weight(), s.input()
    return Program([w], lambda region: region(lambda x: F.rrelu(x @ w, 0.1, 0.9, training=True), x).sum())
