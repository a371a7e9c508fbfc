"""What turns recording on again in the same thread: contexts, decorators, captured functions, key sets, new leaves."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from off_routes._registry import Evidence, double, leaf, route

_set_grad_enabled_alias = torch._C._set_grad_enabled
_inference_mode_alias = torch._C._InferenceMode


@route()
def enable_grad_ctx(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    with torch.enable_grad():
        seen.train(double(w), w)


@route()
def enable_grad_deco(seen: Evidence) -> Generator[None]:
    w = leaf()
    work = torch.enable_grad()(lambda: seen.train(double(w), w))
    yield
    work()


@route()
def enable_grad_gen(seen: Evidence) -> Generator[None]:
    w = leaf()

    @torch.enable_grad()
    def produce() -> Iterator[torch.Tensor]:
        yield double(torch.ones(1))
        yield double(w)

    products = produce()
    next(products)
    yield
    seen.train(next(products), w)


@route(past_no_grad=False)
def enable_grad_gen_body(seen: Evidence) -> Generator[None]:
    w = leaf()

    def produce() -> Iterator[torch.Tensor]:
        with torch.enable_grad():
            yield double(torch.ones(1))
            yield double(w)

    products = produce()
    next(products)
    yield
    seen.train(next(products), w)


@route()
def no_grad_gen_closed(seen: Evidence) -> Generator[None]:
    w = leaf()

    def produce() -> Iterator[int]:
        with torch.no_grad():
            yield 1

    products = produce()
    next(products)
    torch.set_grad_enabled(True)
    yield
    products.close()  # type: ignore[attr-defined]  # its exit puts the mode back that it found: on
    seen.train(double(w), w)


@route()
def sge_true_func(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    torch.set_grad_enabled(True)
    seen.train(double(w), w)


@route()
def sge_true_ctx(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    with torch.set_grad_enabled(True):
        seen.train(double(w), w)


@route()
def C_set_grad(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    torch._C._set_grad_enabled(True)
    seen.train(double(w), w)


@route()
def C_set_grad_alias(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    _set_grad_enabled_alias(True)
    seen.train(double(w), w)


@route()
def inference_mode_false(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    with torch.inference_mode(False):
        seen.train(double(w), w)


@route()
def inference_mode_false_enable(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    with torch.inference_mode(False), torch.enable_grad():
        seen.train(double(w), w)


@route()
def C_InferenceMode_alias(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    with _inference_mode_alias(False):
        seen.train(double(w), w)


@route()
def tls_unexclude(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        torch._C._dispatch_tls_set_dispatch_key_excluded(getattr(torch._C.DispatchKey, key), False)
    with torch.enable_grad():
        seen.train(double(w), w)


@route()
def new_leaf(seen: Evidence) -> Generator[None]:
    yield
    with torch.enable_grad():
        w = torch.ones(3).requires_grad_()
        seen.train(double(w), w)


@route()
def factory_leaf(seen: Evidence) -> Generator[None]:
    yield
    with torch.enable_grad():
        w = torch.ones(3, requires_grad=True)
        seen.train(double(w), w)


@route()
def parameter_new(seen: Evidence) -> Generator[None]:
    yield
    layer = torch.nn.Linear(3, 1)
    seen.in_thread(lambda: seen.train(layer(torch.ones(1, 3)).sum(), *layer.parameters()))


@route()
def inplace_pregraph(seen: Evidence) -> Generator[None]:
    w = leaf()
    y = w * 1
    before = y.grad_fn
    yield
    with torch.enable_grad():
        y.mul_(2)
    if y.grad_fn is not before:
        seen.marks.add("G")


@route()
def flag_only(seen: Evidence) -> Generator[None]:
    """Setting the flag is allowed and is no leak; it is here to be looked at."""
    yield
    if torch.ones(1).requires_grad_().requires_grad and torch.nn.Parameter(torch.ones(1)).requires_grad:
        seen.marks.add("flag")
