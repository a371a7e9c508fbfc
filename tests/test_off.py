"""`gradctl.off`: what it means to the thread that uses it, how it is held, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradctl
from gradctl import _off, _taps
from recording import in_thread, leaf, records


def test_nothing_is_recorded_inside_and_all_is_as_before_outside() -> None:
    x = leaf()
    with gradctl.off():
        y = x * 2
        assert gradctl.is_off()
        assert y.grad_fn is None
        assert not y.requires_grad
        assert y.is_leaf
        assert not torch.is_inference(y)
    assert not gradctl.is_off()
    assert (x * 2).grad_fn is not None


@pytest.mark.parametrize(
    "enable",
    [
        torch.enable_grad,
        lambda: torch.set_grad_enabled(True),
        lambda: torch.inference_mode(False),
        lambda: torch._C._InferenceMode(False),
    ],
    ids=["enable_grad", "set_grad_enabled", "inference_mode(False)", "_InferenceMode(False)"],
)
def test_nothing_that_enables_gradients_enables_them(enable: Callable[[], Any]) -> None:
    x = leaf()
    with gradctl.off(), enable():
        assert (x * 2).grad_fn is None
        assert (leaf() * 2).grad_fn is None
        assert torch.nn.Linear(3, 1)(torch.ones(3)).grad_fn is None


def test_a_function_decorated_with_enable_grad_before_records_nothing() -> None:
    set_enabled = torch._C._set_grad_enabled
    enabled = torch.enable_grad()(lambda x: x * 2)

    @torch.enable_grad()
    def items(x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield x * 2
        yield x * 3

    x = leaf()
    before = items(x)
    assert next(before).grad_fn is not None
    with gradctl.off():
        assert enabled(x).grad_fn is None
        assert next(before).grad_fn is None
        set_enabled(True)
        assert (x * 2).grad_fn is None
    before.close()


def test_values_are_bitwise_those_of_no_grad() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = layer(x)
    with gradctl.off(), torch.no_grad():
        assert torch.equal(layer(x), expected)
    # Without no_grad the layer itself takes the slower path that training takes; no_grad's values on that path:
    path = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Softmax(-1))
    with torch.no_grad():
        expected = path(x)
    with gradctl.off():
        assert torch.equal(path(x), expected)


def test_no_random_number_is_drawn() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with gradctl.off():
        found = torch.rand(4)
    assert torch.equal(found, expected)


def test_an_activation_is_freed_at_once() -> None:
    w = leaf(4)
    with gradctl.off(), torch.enable_grad():
        activation = w * 2
        freed = weakref.ref(activation)
        total = (activation * activation).sum()
        del activation
        assert freed() is None
    assert total.grad_fn is None


def test_a_python_function_saves_nothing() -> None:
    contexts: list[weakref.ref[Any]] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            contexts.append(weakref.ref(ctx))
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * 2

    captured = Double.apply
    x = leaf()
    with gradctl.off(), torch.enable_grad():
        results = [Double.apply(x), captured(x), in_thread(lambda: captured(x))]
        assert torch.is_grad_enabled()
    gc.collect()
    assert [y.grad_fn for y in results] == [None] * 3
    assert [context() for context in contexts] == [None] * 3
    captured(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_what_is_made_inside_trains_afterwards() -> None:
    w = leaf()
    with gradctl.off():
        y = w * 2
        model = torch.nn.Linear(3, 1)
    (w * y).sum().backward()
    assert torch.equal(w.grad, y)  # type: ignore[arg-type]
    model(torch.ones(3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_flags_tell_the_truth_and_are_copied_and_saved() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    buffer = io.BytesIO()
    with gradctl.off():
        seen = [p.requires_grad for p in model.parameters()]
        copied = copy.deepcopy(model)
        torch.save(model, buffer)
        buffer.seek(0)
        loaded_inside = torch.load(buffer, weights_only=False)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for flags in (seen, *([p.requires_grad for p in m.parameters()] for m in (model, copied, loaded_inside, loaded))):
        assert flags == [True, False]


def test_a_leaf_may_be_changed_in_place() -> None:
    w = leaf()
    with gradctl.off():
        w.add_(1)
        w.view(-1).mul_(2)
        w.retain_grad()
    assert torch.equal(w.detach(), torch.full((3,), 4.0))
    assert w.requires_grad
    assert w.is_leaf


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_it_composes_with_the_modes_of_torch_either_way_round(mode: Callable[[], Any]) -> None:
    with mode():
        with gradctl.off():
            assert (leaf() * 2).grad_fn is None
        assert torch.is_grad_enabled() is (mode is torch.enable_grad)
    with gradctl.off():
        with mode():
            assert (leaf() * 2).grad_fn is None
        assert (leaf() * 2).grad_fn is None
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert records()


def test_a_no_grad_that_straddles_an_edge_leaves_the_mode_that_it_should() -> None:
    switch, mode = gradctl.off(), torch.no_grad()
    switch.__enter__()
    mode.__enter__()
    switch.__exit__(None, None, None)
    assert not torch.is_grad_enabled()
    mode.__exit__(None, None, None)
    assert torch.is_grad_enabled()


# holding it


def test_it_nests() -> None:
    with gradctl.off():
        with gradctl.off():
            assert not records()
        assert not records()
    assert records()


def test_one_object_may_be_entered_again_while_it_is_held() -> None:
    switch = gradctl.off()
    with switch, switch:
        pass
    with switch:
        with switch:
            pass
        assert not records()
    assert records()


def test_it_may_be_left_in_another_thread() -> None:
    switch = gradctl.off()
    switch.__enter__()
    in_thread(lambda: switch.__exit__(None, None, None))
    assert records()


def test_leaving_more_often_than_entering_is_refused() -> None:
    switch = gradctl.off()
    with switch:
        pass
    with pytest.raises(gradctl.UsageError, match="left more often than it was entered"):
        switch.__exit__(None, None, None)


@pytest.mark.parametrize("error", [KeyError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_an_exception_turns_it_back(error: type[BaseException]) -> None:
    with pytest.raises(error), gradctl.off():
        raise error
    assert records()


def test_start_and_remove_do_nothing_the_second_time() -> None:
    switch = gradctl.off().start()
    try:
        assert switch.start() is switch
        assert not records()
        with switch:
            assert not records()
        assert not records()
    finally:
        switch.remove()
    assert records()
    switch.remove()
    with gradctl.off():
        switch.remove()
        assert not records()
    switch.start()
    assert not records()
    in_thread(switch.remove)
    assert records()


def test_of_two_threads_that_start_one_switch_one_does() -> None:
    switch = gradctl.off()
    meet = threading.Barrier(4)

    def start() -> None:
        meet.wait(30)
        switch.start()

    for _ in range(20):
        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not records()
        switch.remove()
        assert records()


def test_a_wait_that_is_no_time_is_refused() -> None:
    with pytest.raises(gradctl.UsageError, match=r"drain_seconds=-1"):
        gradctl.off(drain_seconds=-1)
    for wrong in ("x", "30", None, float("nan")):
        with pytest.raises(gradctl.UsageError, match="drain_seconds"):
            gradctl.off(drain_seconds=wrong)  # type: ignore[call-overload]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["enter", "leave", "start", "remove"])), max_size=25))
def test_it_is_off_exactly_while_somebody_holds_it(moves: list[tuple[int, str]]) -> None:
    switches = [gradctl.off() for _ in range(3)]
    entered, started = [0, 0, 0], [False, False, False]
    try:
        for which, move in moves:
            if move == "enter":
                switches[which].__enter__()
                entered[which] += 1
            elif move == "leave" and entered[which]:
                switches[which].__exit__(None, None, None)
                entered[which] -= 1
            elif move == "start":
                switches[which].start()
                started[which] = True
            elif move == "remove":
                switches[which].remove()
                started[which] = False
            assert records() is not (sum(entered) + sum(started) > 0)
    finally:
        for switch, count in zip(switches, entered, strict=True):
            switch.remove()
            for _ in range(count):
                switch.__exit__(None, None, None)


# decorating


def test_a_decorated_function_keeps_its_name_and_runs_with_gradients_off() -> None:
    @gradctl.off
    def bare(n: int) -> int:
        """Count down."""
        assert not records()
        return bare(n - 1) if n else 7

    @gradctl.off(drain_seconds=1)
    def called(n: int) -> int:
        assert not records()
        return n

    assert bare(3) == 7
    assert called(2) == 2
    assert bare.__name__ == "bare"
    assert bare.__doc__ == "Count down."
    assert records()


def test_a_decorated_function_that_raises_turns_it_back() -> None:
    @gradctl.off
    def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert records()


def test_methods_may_be_decorated_above_and_below_staticmethod_and_classmethod() -> None:
    class Server:
        @gradctl.off
        def method(self) -> bool:
            return records()

        @gradctl.off
        @staticmethod
        def static() -> bool:
            return records()

        @classmethod
        @gradctl.off()
        def of_class(cls) -> bool:
            return records()

    assert not Server().method()
    assert not Server.static()
    assert not Server().static()
    assert not Server.of_class()


def test_a_decorated_generator_is_off_in_its_body_and_not_between_items() -> None:
    @gradctl.off
    def items() -> Iterator[bool]:
        try:
            received = yield records()
            assert received == "sent"
            yield records()
        except KeyError:
            yield records()
        finally:
            ended.append(records())
        return 9

    ended: list[bool] = []
    body = items()
    assert next(body) is False
    assert records()
    assert body.send("sent") is False
    assert records()
    assert body.throw(KeyError) is False
    assert records()
    with pytest.raises(StopIteration) as end:
        next(body)
    assert end.value.value == 9
    assert ended == [False]
    early = items()
    next(early)
    early.close()  # type: ignore[attr-defined]
    assert ended == [False, False]
    assert records()


def test_a_decorated_coroutine_is_off_until_it_is_done() -> None:
    @gradctl.off
    async def work(started: asyncio.Event, go: asyncio.Event) -> bool:
        started.set()
        await go.wait()
        return records() or await asyncio.to_thread(records)

    async def beside() -> tuple[bool, bool]:
        started, go = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(work(started, go))
        await started.wait()
        seen = records()  # process-wide: this task is off too
        go.set()
        return seen, await task

    assert asyncio.iscoroutinefunction(work)
    assert asyncio.run(beside()) == (False, False)
    assert records()


def test_a_decorated_asynchronous_generator_is_off_while_it_makes_an_item() -> None:
    @gradctl.off
    async def items() -> Any:
        try:
            received = yield records()
            assert received == 1
            await asyncio.sleep(0)
            yield records()
        finally:
            ended.append(records())

    ended: list[bool] = []

    async def consume() -> list[bool]:
        body = items()
        seen = [await anext(body), records(), await body.asend(1), records()]
        async for _ in body:
            raise AssertionError
        early = items()
        await anext(early)
        await early.aclose()
        return seen

    assert asyncio.run(consume()) == [False, True, False, True]
    assert ended == [False, False]
    assert records()


@pytest.mark.parametrize("thing", [int, property(lambda self: None), 3])
def test_what_is_not_a_function_cannot_be_decorated(thing: Any) -> None:
    with pytest.raises(gradctl.UsageError, match=r"@gradctl\.off on"):
        gradctl.off(thing)


# leaving nothing behind


def test_importing_touches_nothing_and_no_torch() -> None:
    code = (
        "import sys, gradctl; gradctl.off; gradctl.is_off(); s = gradctl.off();"
        "assert 'torch' not in sys.modules, 'torch';"
        "import torch, gradctl._off._switch, gradctl._taps as t; assert t.installed() == [], t.installed()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def _private_state() -> list[Any]:
    compiled = torch._C._dynamo.compiled_autograd
    asked = compiled.set_autograd_compiler(None, False)
    compiled.set_autograd_compiler(*asked)
    return [
        torch._C._FunctionBase.__dict__["apply"],
        vars(torch.Tensor).get("requires_grad"),
        vars(torch.Tensor).get("requires_grad_"),
        vars(torch.nn.Parameter)["__new__"],
        asked[0],
        str(torch._C._dispatch_tls_local_exclude_set()),
        str(torch._C._dispatch_tls_local_include_set()),
        torch._C._is_fwd_grad_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        sys.getprofile(),
        sys.gettrace(),
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_what_it_patches_is_restored_exactly(strict: bool) -> None:
    engine = torch.autograd.Variable._execution_engine
    compiler = torch._C._dynamo.compiled_autograd.set_autograd_compiler
    before = _private_state()
    for _ in range(3):
        with gradctl.off(strict=strict):
            pass
        assert _private_state() == before
    assert _taps.installed()
    _off.uninstall()
    assert _taps.installed() == []
    assert torch.autograd.Variable._execution_engine is engine
    assert torch._C._dynamo.compiled_autograd.set_autograd_compiler is compiler


def test_taking_it_out_while_it_is_held_is_refused() -> None:
    with gradctl.off(), pytest.raises(gradctl.SwitchFailed, match="gradients are off"):
        _off.uninstall()


def test_a_profiler_and_a_tracer_of_the_program_are_left_alone() -> None:
    def mine(*_: Any) -> None:
        return None

    before = sys.getprofile(), sys.gettrace()
    sys.setprofile(mine)
    try:
        with gradctl.off():
            assert sys.getprofile() is mine
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(before[0])
        sys.settrace(before[1])


def test_the_self_test_is_not_seen_by_the_modes_of_the_caller() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with gradctl.off():
        pass
    with Functions(), Operations(), gradctl.off():
        pass
    assert seen == []


def test_no_object_is_kept_by_turning() -> None:
    for _ in range(50):
        with gradctl.off():
            pass
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        with gradctl.off():
            pass
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_the_journal_hears_of_both_edges() -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    class Journal:
        def event(self, name: str, /, **fields: Any) -> None:
            events.append((name, fields))

    from gradctl import _journal

    _journal.set_current(Journal())  # type: ignore[arg-type]
    try:
        with gradctl.off(), gradctl.off():
            pass
    finally:
        _journal.set_current(None)
    assert [(name, fields["state"]) for name, fields in events] == [("off", "off"), ("off", "on")]
    assert all("test_off.py:" in fields["site"] for _, fields in events)
