"""torch.func, forward mode, torch.autograd.functional: they must be refused, never answered with zeros."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch.autograd import forward_ad

from off_routes._registry import Evidence, leaf, route, square


def _x() -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0])


@route()
def func_grad(seen: Evidence) -> Generator[None]:
    yield
    seen.derivative(torch.func.grad(square)(_x()), 2 * _x())


@route()
def func_grad_alias(seen: Evidence) -> Generator[None]:
    transform = torch.func.grad(square)
    transform(_x())
    yield
    seen.derivative(transform(_x()), 2 * _x())


@route()
def func_vjp(seen: Evidence) -> Generator[None]:
    yield
    _, pull = torch.func.vjp(square, _x())
    seen.derivative(pull(torch.tensor(1.0))[0], 2 * _x())


@route()
def func_vjp_pre(seen: Evidence) -> Generator[None]:
    _, pull = torch.func.vjp(square, _x())
    yield
    seen.derivative(pull(torch.tensor(1.0))[0], 2 * _x())


@route()
def func_jvp(seen: Evidence) -> Generator[None]:
    yield
    seen.derivative(torch.func.jvp(square, (_x(),), (torch.ones(3),))[1], 2 * _x().sum())


@route()
def func_jacrev(seen: Evidence) -> Generator[None]:
    yield
    seen.derivative(torch.func.jacrev(square)(_x()), 2 * _x())


@route()
def func_hessian(seen: Evidence) -> Generator[None]:
    yield
    seen.derivative(torch.func.hessian(square)(_x()), 2 * torch.eye(3))


@route(slow=True)
def func_linearize(seen: Evidence) -> Generator[None]:
    yield
    _, push = torch.func.linearize(square, _x())
    seen.derivative(push(torch.ones(3)), 2 * _x().sum())


def _tangent(dual: torch.Tensor) -> torch.Tensor:
    tangent = forward_ad.unpack_dual(square(dual)).tangent
    return torch.zeros(()) if tangent is None else tangent


@route(name="forward_ad")
def forward_ad_level(seen: Evidence) -> Generator[None]:
    yield
    with forward_ad.dual_level():
        seen.derivative(_tangent(forward_ad.make_dual(_x(), torch.ones(3))), 2 * _x().sum())


@route()
def forward_ad_pre(seen: Evidence) -> Generator[None]:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(_x(), torch.ones(3))
        yield
        seen.derivative(_tangent(dual), 2 * _x().sum())


@route()
def autograd_functional(seen: Evidence) -> Generator[None]:
    yield
    seen.derivative(torch.autograd.functional.jacobian(square, _x()), 2 * _x())


@route()
def autograd_functional_hessian(seen: Evidence) -> Generator[None]:
    yield
    seen.derivative(torch.autograd.functional.hessian(square, _x()), 2 * torch.eye(3))


@route(past_no_grad=False)
def gradcheck(seen: Evidence) -> Generator[None]:
    w = leaf().detach().double().requires_grad_()
    yield
    if torch.autograd.gradcheck(square, (w,)):
        seen.marks.add("AD")
