"""`gradctl.off` and other threads: which it reaches, what it waits for, and that nothing locks up."""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import importlib
import multiprocessing.pool
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gradctl
from gradctl import _off
from gradctl._off import _switch
from recording import Held, in_thread, leaf, records


def _pthread(call: Callable[[], None]) -> None:
    """Run `call` in a thread that C made."""
    libc = ctypes.CDLL(None)
    entry = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: call())
    thread = ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(thread), None, entry, None) == 0
    assert libc.pthread_join(thread, None) == 0


def test_threads_of_every_kind_record_nothing() -> None:
    jobs: queue.Queue[Any] = queue.Queue()
    answers: queue.Queue[bool] = queue.Queue()

    def serve() -> None:
        while jobs.get():
            answers.put(records())

    blocked = threading.Thread(target=serve)
    blocked.start()
    with (
        concurrent.futures.ThreadPoolExecutor(1) as warm,
        multiprocessing.pool.ThreadPool(1) as pool,
    ):
        assert warm.submit(records).result()
        assert pool.apply(records)
        with gradctl.off():
            jobs.put(True)
            foreign: list[bool] = []
            _pthread(lambda: foreign.append(records()))
            timed: list[bool] = []
            timer = threading.Timer(0, lambda: timed.append(records()))
            timer.start()
            timer.join()
            with concurrent.futures.ThreadPoolExecutor(1) as cold:
                seen = {
                    "new": in_thread(records),
                    "blocked since before": answers.get(timeout=30),
                    "warm executor": warm.submit(records).result(),
                    "new executor": cold.submit(records).result(),
                    "thread pool": pool.apply(records),
                    "timer": timed[0],
                    "pthread": foreign[0],
                }
        assert not any(seen.values()), seen
        jobs.put(True)
        assert answers.get(timeout=30)
        assert warm.submit(records).result()
    jobs.put(False)
    blocked.join()


def test_a_busy_thread_stops_recording_at_once() -> None:
    stop, turned = threading.Event(), threading.Event()
    after: list[bool] = []

    def spin() -> None:
        x = leaf()
        while not stop.is_set():
            before = turned.is_set()
            recorded = (x * 2).grad_fn is not None
            if before:
                after.append(recorded)

    thread = threading.Thread(target=spin)
    thread.start()
    with gradctl.off():
        turned.set()
        while len(after) < 100:
            time.sleep(0.001)
        turned.clear()
    stop.set()
    thread.join()
    assert not any(after[:100])


def test_two_threads_may_hold_it_and_the_last_one_opens_it() -> None:
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with gradctl.off():
            held.set()
            let_go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with gradctl.off():
        pass
    assert not records()
    let_go.set()
    thread.join()
    assert records()


# backwards that are running


def _held_backward(x: torch.Tensor) -> tuple[threading.Thread, threading.Event]:
    """Start a backward in another thread that has begun and waits for the event."""
    started, go = threading.Event(), threading.Event()
    loss = Held.apply(x, started, go).sum()
    thread = threading.Thread(target=loss.backward, name="trainer")
    thread.start()
    assert started.wait(30)
    return thread, go


@pytest.mark.parametrize("first_use", [True, False])
def test_a_running_backward_is_awaited_and_keeps_all_of_its_gradients(first_use: bool) -> None:
    if not first_use:
        with gradctl.off():
            pass
    weights = [leaf() for _ in range(4)]
    thread, go = _held_backward(sum(weights, torch.zeros(3)))
    threading.Timer(0.1, go.set).start()
    assert [w.grad for w in weights] == [None] * 4
    with gradctl.off():
        assert all(torch.equal(w.grad, torch.ones(3)) for w in weights)  # type: ignore[arg-type]
    thread.join()


@pytest.mark.parametrize("first_use", [True, False])
def test_a_backward_that_does_not_end_leaves_everything_as_it_was(first_use: bool) -> None:
    if not first_use:
        with gradctl.off():
            pass
    w = leaf()
    thread, go = _held_backward(w)
    with pytest.raises(gradctl.SwitchFailed) as error, gradctl.off(drain_seconds=0.05):
        raise AssertionError
    assert "backward in thread trainer did not end within 0.05 s" in str(error.value)
    assert "drain_seconds" in str(error.value)
    assert not gradctl.is_off()
    assert records()
    go.set()
    thread.join()
    assert w.grad is not None
    leaf().sum().backward()  # and new backwards are let in again
    with gradctl.off():
        assert not records()


def test_a_backward_within_a_running_backward_is_let_in_while_the_switch_waits() -> None:
    """A reentrant recomputation belongs to the backward that the switch waits for."""
    with gradctl.off():
        pass
    inner, outer = leaf(), leaf()
    started, go = threading.Event(), threading.Event()

    def hook(grad: torch.Tensor) -> torch.Tensor:
        started.set()
        assert go.wait(30)
        with torch.enable_grad():
            (inner * 2).sum().backward()
        return grad

    y = outer * 3
    y.register_hook(hook)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    assert started.wait(30)
    switched = threading.Thread(target=lambda: gradctl.off().__enter__())
    switched.start()
    while not _off._state.closing:
        time.sleep(0.001)
    with pytest.raises(gradctl.BackwardRefused):  # one that begins now is not
        leaf().sum().backward()
    go.set()
    thread.join()
    switched.join()
    _switch.leave(strict=False)
    assert torch.equal(inner.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    assert torch.equal(outer.grad, torch.full((3,), 3.0))  # type: ignore[arg-type]


def test_a_hook_may_switch_off_and_on_within_its_own_backward() -> None:
    w, seen = leaf(), []

    def hook(grad: torch.Tensor) -> torch.Tensor:
        with gradctl.off():
            seen.append(records())
        return grad

    y = w * 2
    y.register_hook(hook)
    y.sum().backward()
    assert seen == [False]
    assert torch.equal(w.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_starting_inside_a_backward_is_refused() -> None:
    w = leaf()
    y = w * 2
    y.register_hook(lambda grad: gradctl.off().start() and grad)
    with pytest.raises(gradctl.SwitchFailed, match=r"start\(\) was called inside a running backward"):
        y.sum().backward()
    assert records()


def test_a_hook_that_leaves_it_off_makes_its_backward_raise() -> None:
    with gradctl.off():
        pass
    w, switch = leaf(), gradctl.off()

    def hook(grad: torch.Tensor) -> torch.Tensor:
        switch.__enter__()
        return grad

    y = w * 2
    y.register_hook(hook)
    with pytest.raises(gradctl.BackwardRefused, match="gradients may be partial"):
        y.sum().backward()
    switch.__exit__(None, None, None)
    assert records()


def test_two_hooks_that_switch_at_the_same_time_do_not_wait_for_each_other() -> None:
    meet = threading.Barrier(2)
    finished: list[str] = []

    def train() -> None:
        w = leaf()

        def hook(grad: torch.Tensor) -> torch.Tensor:
            meet.wait(30)
            with gradctl.off(drain_seconds=20):
                assert not records()
            return grad

        y = w * 2
        y.register_hook(hook)
        try:
            y.sum().backward()
        except gradctl.SwitchFailed:
            finished.append("waited for the other")
        except gradctl.BackwardRefused:
            finished.append("refused")  # the other one kept gradients off during the rest of this backward
        else:
            assert torch.equal(w.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
            finished.append("whole")

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == 2
    assert "waited for the other" not in finished
    assert records()


# anywhere


def test_a_finalizer_may_switch_in_the_middle_of_a_turn() -> None:
    seen: list[bool] = []

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            with gradctl.off():
                seen.append(records())

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(30):
            Cycle()
            with gradctl.off():
                assert not records()
            assert records()
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert len(seen) == 30
    assert not any(seen)


def test_a_signal_handler_may_switch_at_any_moment() -> None:
    seen: list[bool] = []

    ready = threading.Event()

    def handler(*_: Any) -> None:
        with gradctl.off():
            seen.append(records())
        ready.set()

    before = signal.signal(signal.SIGUSR1, handler)
    stop = threading.Event()

    def bother() -> None:
        while not stop.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            ready.wait(1)  # one at a time: handlers of more would nest without end
            ready.clear()
            time.sleep(0.0003)

    thread = threading.Thread(target=bother)
    thread.start()
    try:
        for _ in range(300):
            with gradctl.off():
                assert not records()
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert records()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("step", range(9))
@pytest.mark.parametrize("keeps", [True, False])
def test_a_turn_that_is_interrupted_by_another_is_finished_by_it(
    step: int, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deterministic: another use of the switch falls between any two steps of a turn."""
    with gradctl.off():
        pass
    installed = _switch._installed
    assert installed is not None
    count, busy = 0, False
    kept = gradctl.off()

    def interrupt() -> None:
        nonlocal count, busy
        count += 1
        if count != step + 1 or busy:
            return
        busy = True
        if keeps:
            kept.start()
        with gradctl.off():
            assert not records()

    def followed_by_interrupt(inner: Callable[[], Any]) -> Callable[[], Any]:
        def step_of_a_turn() -> Any:
            result = inner()
            interrupt()
            return result

        return step_of_a_turn

    for part in (installed.engine, installed.apply, installed.autograd, installed.stance):
        for name in ("shut", "open"):
            monkeypatch.setattr(part, name, followed_by_interrupt(getattr(part, name)))
    with gradctl.off():
        assert not records()
    assert records() is not (keeps and busy)
    kept.remove()
    assert records()
    monkeypatch.undo()
    assert not _off.is_off()


def test_a_fork_beside_a_toggling_thread_leaves_a_child_that_works() -> None:
    importlib.import_module("torch._dynamo.convert_frame")  # whose lock a turn takes too

    stop = threading.Event()

    def toggle() -> None:
        while not stop.is_set():
            with gradctl.off():
                pass

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                # A child is born as its parent is at that moment; off or on, it must be able to turn.
                fine = False
                try:
                    fine = records() is not gradctl.is_off()
                    with gradctl.off(drain_seconds=5):
                        fine = fine and not records()
                finally:
                    os._exit(0 if fine else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


def test_a_forked_child_does_not_wait_for_a_backward_of_its_parent() -> None:
    with gradctl.off():
        pass
    thread, go = _held_backward(leaf())
    pid = os.fork()
    if pid == 0:
        fine = False
        try:
            with gradctl.off(drain_seconds=5):  # SwitchFailed if it waits for a thread that it does not have
                fine = not records()
        finally:
            os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    go.set()
    thread.join()


def test_two_thousand_turns_beside_three_training_threads_break_nothing() -> None:
    stop = threading.Event()
    faults: list[BaseException] = []
    steps = [0, 0, 0]

    def train(number: int) -> None:
        torch.manual_seed(number)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        x = torch.randn(16, 4)
        while not stop.is_set():
            try:
                model.zero_grad()
                model(x).square().mean().backward()
                steps[number] += 1
            except gradctl.BackwardRefused:
                continue
            except RuntimeError as error:
                if "does not require grad" not in str(error):  # the whole forward ran while gradients were off
                    faults.append(error)
            except BaseException as error:
                faults.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    threads = [threading.Thread(target=train, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2000):
            with gradctl.off():
                pass
        with gradctl.off():
            assert not records()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert faults == []
    assert all(steps)
    assert records()
    assert in_thread(records)
