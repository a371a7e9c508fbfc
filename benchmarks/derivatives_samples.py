"""The arms of `derivatives.py` that take samples apart, penalise gradients or unroll steps.

Functions from a case (a model on a batch, see `derivatives.Case`) to something that runs once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import gradctl

CE = nn.functional.cross_entropy
Run = Callable[[], Any]
Make = Callable[[Any], Run]
STEPS, TASKS, RATE = 5, 8, 0.01


def grads_by_func(case: Any) -> Run:
    """As torch's tutorial does it."""
    named = case.named()

    def one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return CE(functional_call(case.model, params, (x.unsqueeze(0),)), y.unsqueeze(0))

    mapped = vmap(grad(one), in_dims=(None, 0, 0), randomness="different")
    return lambda: mapped(named, case.x, case.y)


def grads_looped(case: Any) -> Run:
    def run() -> Any:
        rows = [
            torch.autograd.grad(CE(case.model(x), y), case.params)
            for x, y in zip(case.x.split(1), case.y.split(1), strict=True)
        ]
        return [torch.stack(some) for some in zip(*rows, strict=True)]

    return run


def _copy(case: Any) -> nn.Module:
    """A model that a library may hook and wrap."""
    return type(case)(case.kind).model


def grads_by_opacus(case: Any) -> Run:
    wrapped = importlib.import_module("opacus").GradSampleModule(_copy(case), loss_reduction="mean")

    def run() -> Any:
        wrapped.zero_grad()
        CE(wrapped(case.x), case.y).backward()
        return [param.grad_sample for param in wrapped.parameters()]

    return run


def grads_by_backpack(case: Any) -> Run:
    library = importlib.import_module("backpack")
    extension = importlib.import_module("backpack.extensions").BatchGrad
    model, loss = library.extend(_copy(case)), library.extend(nn.CrossEntropyLoss())

    def run() -> Any:
        model.zero_grad()
        with library.backpack(extension()):
            loss(model(case.x), case.y).backward()
        return [param.grad_batch * len(case.x) for param in model.parameters()]

    return run


def grads_by_expanded_weights(case: Any) -> Run:
    expand = importlib.import_module("torch.nn.utils._per_sample_grad").call_for_per_sample_grads
    model = _copy(case)

    def run() -> Any:
        for param in model.parameters():
            param.grad_sample = None
        CE(expand(model, loss_reduction="mean")(case.x), case.y).backward()
        return [param.grad_sample for param in model.parameters()]

    return run


def norms_by_func(case: Any) -> Run:
    each = grads_by_func(case)
    return lambda: torch.cat([g.flatten(1) for g in each().values()], 1).norm(dim=1)


def norms_by_opacus(case: Any) -> Run:
    """Ghost clipping's first pass."""
    package = importlib.import_module("opacus.grad_sample")
    wrapped = package.GradSampleModuleFastGradientClipping(
        _copy(case), loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def run() -> Any:
        wrapped.zero_grad()
        CE(wrapped(case.x), case.y).backward()
        return wrapped.get_norm_sample()

    return run


def norms_by_backpack(case: Any) -> Run:
    library = importlib.import_module("backpack")
    extension = importlib.import_module("backpack.extensions").BatchL2Grad
    model, loss = library.extend(_copy(case)), library.extend(nn.CrossEntropyLoss())

    def run() -> Any:
        model.zero_grad()
        with library.backpack(extension()):
            loss(model(case.x), case.y).backward()
        squares = [param.batch_l2 for param in model.parameters()]
        return torch.stack(squares).sum(0).sqrt() * len(case.x)

    return run


def penalty(compute: Callable[[Any, Tensor], Tensor]) -> Make:
    """The gradient of a penalty on the first output, with respect to the parameters."""

    def make(case: Any) -> Run:
        def run() -> Any:
            x = case.x.detach().requires_grad_()
            return torch.autograd.grad(compute(case, x), case.params, allow_unused=True, materialize_grads=True)

        return run

    return make


def penalty_by_hand(case: Any, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(case.model(x)[:, 0].sum(), x, create_graph=True)
    return ((g.flatten(1).norm(dim=1) - 1) ** 2).mean()


def penalty_of_gradctl(case: Any, x: Tensor) -> Tensor:
    return gradctl.gradient_penalty(case.model(x)[:, 0], x)


def penalty_by_func(case: Any) -> Run:
    named = case.named()

    def of_one(params: dict[str, Tensor], x: Tensor) -> Tensor:
        slope = grad(lambda x: functional_call(case.model, params, (x.unsqueeze(0),))[0, 0])(x)
        return (slope.norm() - 1) ** 2

    return lambda: grad(lambda params: vmap(of_one, in_dims=(None, 0))(params, case.x).mean())(named)


def _tasks(case: Any) -> tuple[Tensor, Tensor]:
    """Eight tasks of sixteen samples."""
    return case.x.reshape(TASKS, -1, *case.x.shape[1:]), case.y.reshape(TASKS, -1)


def maml_by_hand(case: Any) -> Run:
    xs, ys = _tasks(case)

    def run() -> Any:
        total: Any = 0
        for x, y in zip(xs, ys, strict=True):
            params = dict(case.model.named_parameters())
            for _ in range(STEPS):
                loss = CE(functional_call(case.model, params, (x,)), y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {name: p - RATE * g for (name, p), g in zip(params.items(), grads, strict=True)}
            total = total + CE(functional_call(case.model, params, (x,)), y)
        return torch.autograd.grad(total, case.params)

    return run


def maml_of_gradctl(tasks: Any) -> Make:
    def make(case: Any) -> Run:
        xs, ys = _tasks(case)

        def inner(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return CE(functional_call(case.model, params, (x,)), y)

        def run() -> Any:
            start = dict(case.model.named_parameters())
            end = gradctl.unrolled(inner, start, STEPS, lr=RATE, batch=(xs, ys), tasks=tasks)
            return torch.autograd.grad(vmap(inner)(end.params, xs, ys).sum(), case.params)

        return run

    return make


def maml_by_higher(case: Any) -> Run:
    higher = importlib.import_module("higher")
    xs, ys = _tasks(case)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=RATE)

    def run() -> Any:
        total: Any = 0
        for x, y in zip(xs, ys, strict=True):
            # Its default copies the initial weights, and then no gradient reaches them.
            with higher.innerloop_ctx(case.model, optimizer, copy_initial_weights=False) as (model, steps):
                for _ in range(STEPS):
                    steps.step(CE(model(x), y))
                total = total + CE(model(x), y)
        return torch.autograd.grad(total, case.params)

    return run


GRADS: dict[str, Make] = {
    "gradctl.per_sample_grads": lambda case: lambda: gradctl.per_sample_grads(case.model, CE, (case.x, case.y)),
    "vmap(grad)": grads_by_func,
    "loop over the samples": grads_looped,
    "opacus": grads_by_opacus,
    "backpack": grads_by_backpack,
    "expanded weights": grads_by_expanded_weights,
}
NORMS: dict[str, Make] = {
    "gradctl.per_sample_norms": lambda case: lambda: gradctl.per_sample_norms(case.model, CE, (case.x, case.y)),
    "vmap(grad), then norms": norms_by_func,
    "opacus ghost norms": norms_by_opacus,
    "backpack BatchL2Grad": norms_by_backpack,
}
PENALTIES: dict[str, Make] = {
    "gradctl.gradient_penalty": penalty(penalty_of_gradctl),
    "create_graph by hand": penalty(penalty_by_hand),
    "grad(vmap(grad))": penalty_by_func,
}
LOOPS: dict[str, Make] = {
    "gradctl.unrolled": maml_of_gradctl("auto"),
    "gradctl.unrolled, tasks='loop'": maml_of_gradctl("loop"),
    "functional_call by hand": maml_by_hand,
    "higher": maml_by_higher,
}
