"""Compiled, scripted, traced, exported: programs that decided about gradients before, or decide elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch

from off_routes._registry import Evidence, leaf, route


def _body(w: torch.Tensor) -> torch.Tensor:
    return (w * 2).relu().sum()


def _compiled(backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def fresh(w: torch.Tensor) -> torch.Tensor:
        return (w * 2).relu().sum()

    return torch.compile(fresh, backend=backend)


def _make(backend: str, *, before: bool, enable: bool) -> Callable[[Evidence], Generator[None]]:
    def body(seen: Evidence) -> Generator[None]:
        w = leaf()
        function = _compiled(backend)
        if before:
            function(w).backward()
            w.grad = None
        yield
        if enable:
            with torch.enable_grad():
                seen.train(function(w), w)
        else:
            seen.train(function(w), w)

    return body


for _backend in ("eager", "aot_eager"):
    for _when in ("pre", "post"):
        for _enable in (False, True):
            _name = f"compile_{_backend}_{_when}" + ("_enable" if _enable else "")
            route(name=_name, past_no_grad=_enable, slow=True)(_make(_backend, before=_when == "pre", enable=_enable))


@route(slow=True)
def compile_thread(seen: Evidence) -> Generator[None]:
    w = leaf()
    function = _compiled("aot_eager")
    function(w)
    yield
    seen.in_thread(lambda: seen.train(function(w), w))


@route(slow=True)
def compile_enable_inside(seen: Evidence) -> Generator[None]:
    @torch.compile(backend="aot_eager")
    def function(w: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return (w * 2).relu().sum()

    w = leaf()
    function(w)
    yield
    seen.train(function(w), w)


def _scripted() -> Any:
    function = torch.jit.script(_body)
    for _ in range(3):
        function(leaf()).backward()  # past the profiling runs
    return function


@route(slow=True)
def jit_script(seen: Evidence) -> Generator[None]:
    w = leaf()
    function = _scripted()
    yield
    with torch.enable_grad():
        seen.train(function(w), w)


@route(slow=True)
def jit_script_thread(seen: Evidence) -> Generator[None]:
    w = leaf()
    function = _scripted()
    yield
    seen.in_thread(lambda: seen.train(function(w), w))


@route(slow=True)
def jit_script_enable_inside(seen: Evidence) -> Generator[None]:
    @torch.jit.script
    def function(w: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(True)
        return (w * 2).sum()

    w = leaf()
    yield
    seen.train(function(w), w)


@route(slow=True)
def jit_trace(seen: Evidence) -> Generator[None]:
    layer = torch.nn.Linear(3, 1)
    traced = torch.jit.trace(layer, torch.ones(1, 3))
    yield
    with torch.enable_grad():
        seen.train(traced(torch.ones(1, 3)).sum(), *traced.parameters())


@route()
def fx_set_grad_node(seen: Evidence) -> Generator[None]:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch._C._set_grad_enabled, (True,))
    y = graph.call_function(torch.mul, (x, 2))
    graph.output(graph.call_function(torch.sum, (y,)))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    w = leaf()
    yield
    seen.train(module(w), w)


@route(past_no_grad=False, slow=True)
def export_module(seen: Evidence) -> Generator[None]:
    class Region(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return (self.weight * x).sum()

    module = torch.export.export(Region(), (torch.ones(3),)).module()
    yield
    seen.train(module(torch.ones(3)), *module.parameters())
