"""Python `autograd.Function`, recompute, custom operators, saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from off_routes._registry import Evidence, leaf, route, square


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


_alias = Double.apply
_base = torch._C._FunctionBase.__dict__["apply"]


def _through(apply: Callable[..., torch.Tensor], seen: Evidence) -> None:
    w = leaf()
    seen.train(apply(w).sum(), w)


@route(past_no_grad=False)
def function_apply(seen: Evidence) -> Generator[None]:
    yield
    _through(Double.apply, seen)


@route()
def function_apply_enable(seen: Evidence) -> Generator[None]:
    yield
    with torch.enable_grad():
        _through(Double.apply, seen)


@route()
def function_apply_thread(seen: Evidence) -> Generator[None]:
    yield
    seen.in_thread(lambda: _through(Double.apply, seen))


@route()
def function_apply_alias(seen: Evidence) -> Generator[None]:
    yield
    with torch.enable_grad():
        _through(_alias, seen)


@route()
def function_base_apply(seen: Evidence) -> Generator[None]:
    yield
    with torch.enable_grad():
        _through(_base.__get__(None, Double), seen)


@route()
def function_enable_in_fwd(seen: Evidence) -> Generator[None]:
    kept: list[torch.Tensor] = []

    class Leaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                kept.append((x * 2).sum())
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    w = leaf()
    yield
    Leaks.apply(w)
    seen.train(kept[0], w)


@route()
def ckpt_reentrant(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    with torch.enable_grad():
        seen.train(checkpoint(square, w, use_reentrant=True), w)


@route()
def ckpt_nonreentrant(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    with torch.enable_grad():
        seen.train(checkpoint(square, w, use_reentrant=False), w)


@route(past_no_grad=False)
def ckpt_plain(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    seen.train(checkpoint(square, w, use_reentrant=False), w)


@route()
def custom_op(seen: Evidence) -> Generator[None]:
    @torch.library.custom_op("gradctl_routes::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_autograd(lambda ctx, grad: grad * 2)
    w = leaf()
    yield
    with torch.enable_grad():
        seen.train(twice(w).sum(), w)


@route()
def saved_tensors_hooks(seen: Evidence) -> Generator[None]:
    w = leaf()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.marks.add("saved")
        return tensor

    yield
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        seen.train(square(w), w)
