"""Graphs that were built before: every way to run them."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch.utils.checkpoint import checkpoint

from off_routes._registry import Evidence, double, leaf, route, square

_backward_alias = torch.autograd.backward
_grad_alias = torch.autograd.grad


@route()
def pre_backward(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = double(w)
    yield
    y.backward()
    seen.marks.add("B")
    seen.filled(w)


@route()
def pre_autograd_backward(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = double(w)
    yield
    _backward_alias([y])
    seen.marks.add("B")
    seen.filled(w)


@route()
def pre_autograd_grad(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = double(w)
    yield
    (grad,) = _grad_alias(y, w)
    if grad.any():
        seen.marks.add("B")


def _arguments(y: torch.Tensor) -> tuple[object, ...]:
    # roots, their gradients, keep_graph, create_graph, inputs; allow_unreachable and accumulate_grad go by keyword
    return ((y,), (torch.ones(()),), False, False, ())


@route()
def pre_engine(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = double(w)
    run = torch.autograd.Variable._execution_engine.run_backward
    yield
    run(*_arguments(y), allow_unreachable=True, accumulate_grad=True)
    seen.marks.add("B")
    seen.filled(w)


@route()
def pre_engine_new(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = double(w)
    yield
    torch._C._ImperativeEngine().run_backward(*_arguments(y), allow_unreachable=True, accumulate_grad=True)
    seen.marks.add("B")
    seen.filled(w)


@route()
def aten_backward(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = double(w)
    yield
    torch.ops.aten._backward(y, [w])
    seen.marks.add("B")
    seen.filled(w)


@route(slow=True)
def jit_backward(seen: Evidence) -> Generator[None]:
    @torch.jit.script
    def run(y: torch.Tensor) -> None:
        y.backward()

    w = leaf()
    run(double(leaf()))
    y = double(w)
    yield
    run(y)
    seen.marks.add("B")
    seen.filled(w)


@route(slow=True)
def jit_autograd_grad(seen: Evidence) -> Generator[None]:
    @torch.jit.script
    def run(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
        return torch.autograd.grad([y], [w])[0]

    w = leaf()
    y = double(w)
    yield
    if run(y, w) is not None:
        seen.marks.add("B")


@route()
def pre_backward_thread(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = double(w)
    yield
    seen.in_thread(lambda: (y.backward(), seen.marks.add("B")))
    seen.filled(w)


@route()
def pre_backward_create_graph(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = (w**3).sum()
    yield
    (grad,) = torch.autograd.grad(y, w, create_graph=True)
    seen.marks.add("B")
    seen.graph(grad)


@route()
def pre_backward_hook(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = w * 2
    y.register_hook(lambda grad: seen.marks.add("B"))
    total = y.sum()
    yield
    total.backward()
    seen.filled(w)


@route()
def node_call(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = w * 2
    yield
    assert y.grad_fn is not None
    if y.grad_fn(torch.ones(3))[0] is not None:
        seen.marks.add("B")


@route()
def accumulate_node_call(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = w * 2
    yield
    assert y.grad_fn is not None
    y.grad_fn.next_functions[0][0](torch.ones(3))
    seen.filled(w)


@route()
def ckpt_recompute(seen: Evidence) -> Generator[None]:
    w = leaf()
    runs: list[int] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return square(x)

    y = checkpoint(block, w, use_reentrant=False)
    yield
    before = len(runs)
    y.backward()
    seen.marks.add("B")
    if len(runs) > before:
        seen.marks.add("recompute")
    seen.filled(w)


@route()
def manual_grad_assign(seen: Evidence) -> Generator[None]:
    """Plain data, not autograd."""
    w = leaf()
    yield
    w.grad = torch.ones(3)
    seen.filled(w)


@route()
def optim_step_plain(seen: Evidence) -> Generator[None]:
    """Gradients computed before the switch are applied after it."""
    w = leaf()
    optimizer = torch.optim.SGD([w], lr=1.0)
    double(w).backward()
    yield
    optimizer.step()
    if not torch.equal(w.detach(), torch.ones(3)):
        seen.marks.add("A")


@route()
def optim_closure(seen: Evidence) -> Generator[None]:
    w = leaf()
    optimizer = torch.optim.SGD([w], lr=1.0)

    def closure() -> torch.Tensor:
        loss = double(w)
        seen.train(loss, w)
        return loss

    yield
    optimizer.step(closure)


@route()
def optim_lbfgs(seen: Evidence) -> Generator[None]:
    w = leaf()
    optimizer = torch.optim.LBFGS([w], max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = square(w)
        seen.train(loss, w)
        return loss

    yield
    optimizer.step(closure)


@route()
def optim_differentiable(seen: Evidence) -> Generator[None]:
    w = leaf() * 1
    w.retain_grad()
    w.grad = torch.ones(3, requires_grad=True) * 1
    before = w.grad_fn
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, differentiable=True)
    optimizer.param_groups[0]["params"] = [w]
    yield
    with torch.enable_grad():
        optimizer.step()
    if w.grad_fn is not before:
        seen.marks.add("G")
