"""The portable engine of `gradctl.off`, used where the slot cannot be: broken on purpose, announced once, still off."""

from __future__ import annotations

import concurrent.futures
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gradctl
import settled
from gradctl import _off, _taps
from gradctl._off import _portable, _slot, _switch
from recording import in_thread, leaf, records

settled.compiling()


def _no_symbol(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_slot, "REQUIRES_GRAD", "_ZNK3c1010TensorImpl13no_such_nameEv")


def _no_replacement(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_slot, "REPLACEMENT", "no_such_function_of_libc")


def _wrong_replacement(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_slot, "REPLACEMENT", "getpid")


def _other_machine(patch: pytest.MonkeyPatch) -> None:
    import platform

    patch.setattr(platform, "machine", lambda: "riscv64")


def _no_counters(patch: pytest.MonkeyPatch) -> None:
    from gradctl._off._elf import Loader, Unreadable

    def counters(self: Loader) -> tuple[int, int]:
        raise Unreadable("the loader does not say when a library was loaded")

    patch.setattr(Loader, "counters", counters)


def _foreign_word(patch: pytest.MonkeyPatch) -> None:
    """A slot that somebody else has interposed: the true address is another one than what stands there."""
    real = _slot._address_of

    def address_of(library: Any, symbol: str) -> int:
        return real(library, "strlen" if symbol == _slot.REQUIRES_GRAD else symbol)

    patch.setattr(_slot, "_address_of", address_of)


def _turn_without_effect(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_slot.Slots, "_write", lambda *_: None)


BREAKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "no symbol": (_no_symbol, "no_such_name"),
    "no replacement": (_no_replacement, "no_such_function_of_libc"),
    "a replacement that does more": (_wrong_replacement, "getpid of this libc does more than return 0"),
    "another machine": (_other_machine, "relocations of riscv64 are not known"),
    "a loader that does not count": (_no_counters, "does not say when a library was loaded"),
    "a slot of somebody else": (_foreign_word, "holds an address that is not torch's"),
    "a turn without effect": (_turn_without_effect, "an operation still recorded a graph"),
}


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the slot for the length of a test."""
    _no_replacement(monkeypatch)
    with pytest.warns(RuntimeWarning, match="portable engine"), gradctl.off():
        pass


def _turn_three_times() -> None:
    for _ in range(3):
        with gradctl.off():
            assert not records()
            assert not in_thread(records)
        assert records()


@pytest.mark.parametrize("name", BREAKS)
def test_a_slot_that_cannot_be_used_is_announced_once_and_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, why = BREAKS[name]
    break_it(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"gradctl\.off uses its portable engine here") as caught:
        _turn_three_times()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert why in message
    assert "std::thread" in message
    assert caught[0].filename == __file__
    report = _off.engine_report()
    assert report.engine == "portable"
    assert report.why is not None
    assert why in report.why
    assert any("std::thread" in gap for gap in report.not_covered)


def test_the_report_finds_the_fallback_before_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_replacement(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = _off.engine_report()
    assert report.engine == "portable"
    assert _taps.installed() == []


def test_a_program_that_makes_errors_of_warnings_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_replacement(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="portable engine"), gradctl.off():
            raise AssertionError
    assert not gradctl.is_off()
    assert records()


def test_a_process_in_which_no_engine_works_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _turn_without_effect(monkeypatch)
    monkeypatch.setattr(_portable.Portable, "_follow", lambda self: None)
    with pytest.raises(gradctl.SwitchFailed) as failed, gradctl.off():
        raise AssertionError
    assert "no engine passed its self-test here; everything is as before" in str(failed.value)
    assert not gradctl.is_off()
    w = leaf()
    (w * 2).sum().backward()
    assert w.grad is not None
    _switch._announcements.clear()


@pytest.mark.usefixtures("portable")
def test_threads_that_are_running_are_reached_and_let_go_again() -> None:
    jobs: queue.Queue[Any] = queue.Queue()
    answers: queue.Queue[bool] = queue.Queue()

    def serve() -> None:
        while jobs.get():
            answers.put(records())

    stop, busy = threading.Event(), [True]

    def spin() -> None:
        while not stop.is_set():
            busy[0] = records()

    threads = [threading.Thread(target=work) for work in (serve, spin)]
    for thread in threads:
        thread.start()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(records).result()
        for _ in range(3):
            with gradctl.off():
                jobs.put(True)
                assert not answers.get(timeout=30)
                assert not pool.submit(records).result()
                deadline = time.monotonic() + 30
                while busy[0] and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert not busy[0]
            jobs.put(True)
            assert answers.get(timeout=30)
            assert pool.submit(records).result()
    stop.set()
    jobs.put(False)
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("thread", [False, True])
def test_an_inference_mode_that_straddles_either_edge_leaves_the_state_that_it_should(thread: bool) -> None:
    def straddle() -> None:
        keys = str(torch._C._dispatch_tls_local_exclude_set())
        switch, mode = gradctl.off(), torch.inference_mode()
        mode.__enter__()
        switch.__enter__()
        mode.__exit__(None, None, None)
        assert not records()
        mode = torch.inference_mode()
        mode.__enter__()
        switch.__exit__(None, None, None)
        assert not records()
        mode.__exit__(None, None, None)
        assert records()
        assert str(torch._C._dispatch_tls_local_exclude_set()) == keys

    if thread:
        in_thread(straddle)
    else:
        straddle()


@pytest.mark.usefixtures("portable")
def test_what_is_refused_is_refused_all_the_same() -> None:
    w = leaf()
    y = (w * w).sum()
    with gradctl.off():
        for ask in (y.backward, lambda: torch.func.grad(torch.sin)(torch.ones(()))):
            with pytest.raises(gradctl.BackwardRefused):
                ask()
        assert (w * 2).grad_fn is None
        assert torch.nn.Linear(3, 3)(torch.ones(3)).grad_fn is None
    y.backward()
    assert torch.equal(w.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


@pytest.mark.usefixtures("portable")
def test_values_are_those_of_no_grad_and_tensors_are_ordinary() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    with gradctl.off():
        found = model(x)
    assert torch.equal(found, expected)
    assert not found.is_inference()
    (leaf(4) * found).sum().backward()


@pytest.mark.usefixtures("portable")
def test_a_profiler_of_the_thread_that_turns_is_left_alone() -> None:
    def mine(*_: Any) -> None:
        return None

    before = sys.getprofile()
    sys.setprofile(mine)
    try:
        with gradctl.off():
            assert sys.getprofile() is mine
    finally:
        sys.setprofile(before)


@pytest.mark.usefixtures("portable")
def test_a_function_that_was_compiled_before_runs() -> None:
    model = torch.nn.Linear(3, 1)
    compiled: Any = torch.compile(lambda x: model(x).sum(), backend="aot_eager")
    x = torch.ones(3)
    compiled(x).backward()
    with gradctl.off():
        y = compiled(x)
        assert y.grad_fn is None
        assert torch.equal(y, model(x).sum())
    compiled(x).backward()
