"""What outlives `gradctl.off`: what was compiled, scripted, wrapped or loaded inside trains normally afterwards."""

from __future__ import annotations

import gc
import os
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

import gradctl
import settled
from gradctl import _off
from gradctl._off import _compiled
from recording import in_thread, leaf, records

settled.compiling()
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    # dynamo's own, when it looks at a tensor that it takes over a graph break
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compile(model: nn.Module, backend: str) -> Any:
    return torch.compile(lambda x: model(x).sum(), backend=backend)


def _trains(function: Any, model: nn.Module, x: torch.Tensor) -> None:
    """Check the gradients of `function` against plain torch's."""
    model.zero_grad()
    function(x).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).sum().backward()
    expected = [p.grad for p in model.parameters()]
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if b is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_compiled_before_records_nothing_inside_and_trains_afterwards(backend: str) -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    function = _compile(model, backend)
    _trains(function, model, x)
    with gradctl.off():
        assert function(x).grad_fn is None
        with torch.enable_grad():
            assert function(x).grad_fn is None
        assert in_thread(lambda: function(x).grad_fn) is None
    _trains(function, model, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_first_called_inside_trains_afterwards(backend: str) -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    before = _compile(model, backend)
    with gradctl.off():
        inside = _compile(model, backend)
        expected = model(x).sum()
        for function in (before, inside):
            y = function(x)
            assert y.grad_fn is None
            assert torch.equal(y, expected)
    for function in (before, inside):
        _trains(function, model, x)
        with gradctl.off():
            assert function(x).grad_fn is None


def test_a_module_compiled_in_place_inside_trains_afterwards() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    with gradctl.off():
        model.compile(backend="aot_eager")
        assert model(x).grad_fn is None
    model(x).sum().backward()
    assert model.weight.grad is not None


def test_a_switch_inside_a_compiled_function_turns_it_there() -> None:
    model = nn.Linear(3, 2)

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = model(x * 2).sum()
        with gradctl.off():
            z = model(x).sum()
        return y, z

    function = torch.compile(evaluate, backend="eager")
    for _ in range(2):
        y, z = function(torch.ones(4, 3))
        assert y.grad_fn is not None
        assert z.grad_fn is None
    assert records()


def test_a_decorated_function_may_be_called_from_a_compiled_one() -> None:
    model = nn.Linear(3, 2)

    @gradctl.off
    def target(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    function = torch.compile(lambda x: (model(x) - target(x) + 1).sum(), backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        function(torch.ones(4, 3)).backward()
        assert torch.equal(model.bias.grad, torch.full((2,), 4.0))  # type: ignore[arg-type]


def test_the_stance_of_the_program_is_never_touched_and_a_stricter_one_still_holds() -> None:
    from torch._dynamo import eval_frame

    before, decide = eval_frame._stance, eval_frame._callback_from_stance
    compiled = object()
    with gradctl.off():
        assert eval_frame._stance is before
        assert eval_frame._callback_from_stance(compiled) is False
        with torch.compiler.set_stance("force_eager"), gradctl.off():
            assert eval_frame._callback_from_stance(compiled) is None
    assert eval_frame._stance is before
    assert eval_frame._callback_from_stance(compiled) is compiled
    with torch.compiler.set_stance("fail_on_recompile"), gradctl.off():
        assert callable(eval_frame._callback_from_stance(compiled))
    _off.uninstall()
    assert eval_frame._callback_from_stance is decide


def test_turning_the_switch_never_breaks_the_calls_of_a_thread_that_dynamo_serves() -> None:
    # zero_grad asks dynamo for its stance at every call, and dynamo reads it several times over.
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    function = _compile(nn.Linear(3, 2), "eager")
    function(torch.ones(4, 3))
    faults: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                optimizer.zero_grad()
                function(torch.ones(4, 3))
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(300):
            with gradctl.off():
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert faults == []


def test_what_is_compiled_inside_in_spite_of_the_stance_is_dropped() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    function = _compile(model, "aot_eager")
    with gradctl.off(), torch.compiler.set_stance("default"):
        assert function(x).grad_fn is None
    _trains(function, model, x)


def test_a_compilation_in_another_thread_is_awaited() -> None:
    compiling, go = threading.Event(), threading.Event()

    def backend(graph: Any, inputs: Any) -> Any:
        compiling.set()
        assert go.wait(30)
        return graph.forward

    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    function = torch.compile(lambda x: model(x).sum(), backend=backend)
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(function(x)))
    thread.start()
    assert compiling.wait(60)
    with pytest.raises(gradctl.SwitchFailed, match=r"compilation by torch\.compile"), gradctl.off(drain_seconds=0.05):
        raise AssertionError
    threading.Timer(0.1, go.set).start()
    with gradctl.off():
        assert _compiled.lock() is not None
        assert not records()
    thread.join()
    assert len(results) == 1
    _trains(function, model, x)


def test_a_scripted_module_profiled_inside_trains_afterwards() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), torch.ones(4, 3)
    before = torch.jit.script(model)
    with gradctl.off():
        inside = torch.jit.script(model)
        traced = torch.jit.trace(model, x)
        for function in (before, inside, traced):
            for _ in range(4):
                assert function(x).grad_fn is None
    for function in (before, inside, traced):
        for _ in range(3):
            _trains(lambda x, f=function: f(x).sum(), model, x)


def test_a_model_wrapped_for_data_parallel_training_inside_trains_afterwards(tmp_path: Any) -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), torch.ones(4, 3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with gradctl.off():
            models = [nn.parallel.DistributedDataParallel(model)]
            assert models[0](x).grad_fn is None
        for _ in range(2):
            _trains(lambda x: models[0](x).sum(), model, x)
        models.clear()  # it holds the group, and with it what the group has opened
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
        os.environ.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING", None)


def test_a_model_built_and_loaded_inside_trains_afterwards(tmp_path: Any) -> None:
    path = tmp_path / "weights.pt"
    torch.save(nn.Linear(3, 2).state_dict(), path)
    with gradctl.off():
        model = nn.Linear(3, 2)
        model.load_state_dict(torch.load(path))
        assert model(torch.ones(3)).grad_fn is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight.detach(), before - 0.1)


def test_a_custom_operation_with_a_derivative_records_nothing() -> None:
    @torch.library.custom_op("gradctl_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_autograd(lambda ctx, grad: grad * 2)
    w = leaf()
    with gradctl.off(), torch.enable_grad():
        assert twice(w).grad_fn is None
    twice(w).sum().backward()
    assert torch.equal(w.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


# dynamo's own, when it traces an autograd.Function
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_calls_of_ours_in_a_forward_are_compiled_after_gradients_were_off() -> None:
    torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(2))  # the compiler is there
    with gradctl.off():
        pass

    def loss(x: torch.Tensor) -> torch.Tensor:
        return gradctl.reverse(x * 2, strength=0.5).sum()

    x = torch.ones(3, requires_grad=True)
    torch.compile(loss, backend="aot_eager", fullgraph=True)(x).backward()
    assert torch.equal(x.grad, torch.full((3,), -1.0))
