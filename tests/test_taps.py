"""Taps: one stub per entry point, composed in a stated order, undone exactly."""

from __future__ import annotations

import os
import threading
import types

import pytest
import torch

from gradctl import _taps
from gradctl._taps import AttributeTap


def tap_on(owner: object, name: str) -> AttributeTap:
    return AttributeTap("test", lambda: [(owner, name)])


def mark(log: list[str], word: str):
    def wrap(inner):
        def call(*args, **kwargs):
            log.append(word)
            return inner(*args, **kwargs)

        return call

    return wrap


def test_importing_the_taps_touches_nothing():
    assert _taps.installed() == []


def test_subscribers_run_in_the_stated_order_whatever_order_they_came_in():
    owner, log = types.SimpleNamespace(f=lambda x: x + 1), []
    tap = tap_on(owner, "f")
    handles = [tap.subscribe(mark(log, word), order=word) for word in ("record", "veto", "measure")]
    assert owner.f(1) == 2
    assert log == ["veto", "measure", "record"]
    for handle in handles:
        handle.remove()


def test_the_last_handle_puts_back_the_very_object():
    original = lambda: 7  # noqa: E731
    owner = types.SimpleNamespace(f=original)
    tap = tap_on(owner, "f")
    first, second = (tap.subscribe(lambda inner: inner, order="record") for _ in range(2))
    first.remove()
    first.remove()
    assert owner.f is not original
    second.remove()
    assert owner.f is original
    assert not tap.is_installed()


def test_an_inherited_attribute_is_deleted_again():
    class Base:
        @classmethod
        def apply(cls, x):
            return cls, x

    class Child(Base):
        pass

    log: list[str] = []
    tap = tap_on(Child, "apply")
    handle = tap.subscribe(mark(log, "seen"), order="veto")
    captured = Child.apply
    assert Child.apply(3) == (Child, 3)
    assert captured(4) == (Child, 4)
    assert log == ["seen", "seen"]
    handle.remove()
    assert "apply" not in vars(Child)
    assert captured(5) == (Child, 5)
    assert log == ["seen", "seen"]


def test_a_foreign_patch_above_ours_survives_and_ours_falls_silent():
    original = lambda: "torch"  # noqa: E731
    owner, log = types.SimpleNamespace(f=original), []
    tap = tap_on(owner, "f")
    handle = tap.subscribe(mark(log, "ours"), order="record")
    below = owner.f

    def foreign():
        return "foreign+" + below()

    owner.f = foreign
    handle.remove()
    assert owner.f is foreign
    assert owner.f() == "foreign+torch"
    assert log == []
    handle = tap.subscribe(mark(log, "again"), order="record")
    assert owner.f() == "foreign+torch"
    assert log == ["again"]
    owner.f = below
    handle.remove()
    assert owner.f is original


def test_a_veto_that_raises_keeps_the_call_from_happening():
    called: list[int] = []
    owner = types.SimpleNamespace(f=lambda: called.append(1))

    def refuse(inner):
        def call(*args, **kwargs):
            raise PermissionError

        return call

    handle = tap_on(owner, "f").subscribe(refuse, order="veto")
    with pytest.raises(PermissionError):
        owner.f()
    handle.remove()
    owner.f()
    assert called == [1]


def test_the_engine_tap_sees_backward_and_grad_and_leaves_the_rest_of_the_engine_alone():
    engine = torch.autograd.Variable._execution_engine
    outputs: list[int] = []

    def wrap(inner):
        def run(tensors, *args, **kwargs):
            outputs.append(len(tensors))
            return inner(tensors, *args, **kwargs)

        return run

    handle = _taps.engine.subscribe(wrap, order="record")
    x = torch.ones(2, requires_grad=True)
    (x * 2).sum().backward()
    torch.autograd.grad((x * 3).sum(), x)
    thread = threading.Thread(target=lambda: (x * 4).sum().backward())
    thread.start()
    thread.join()
    assert torch.autograd.Variable._execution_engine.queue_callback == engine.queue_callback
    handle.remove()
    assert outputs == [1, 1, 1]
    assert torch.autograd.Variable._execution_engine is engine
    assert torch.equal(x.grad, torch.full((2,), 6.0))


def test_the_step_tap_calls_before_and_after_in_mirrored_order():
    log: list[str] = []
    handles = [
        _taps.optimizer_step.subscribe(
            before=lambda o, a, k, w=word: log.append("<" + w),
            after=lambda o, a, k, w=word: log.append(w + ">"),
            order=word,
        )
        for word in ("record", "veto")
    ]
    weight = torch.ones(1, requires_grad=True)
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight], lr=0.5).step()
    assert log == ["<veto", "<record", "record>", "veto>"]
    for handle in handles:
        handle.remove()
    torch.optim.SGD([weight], lr=0.5).step()
    assert len(log) == 4
    assert weight.item() == 0.0


def test_the_parameter_tap_hears_registrations():
    heard: list[str] = []
    handle = _taps.parameter_registered.subscribe(lambda module, name, parameter: heard.append(name))
    torch.nn.Linear(2, 2)
    handle.remove()
    torch.nn.Linear(2, 2)
    assert heard == ["weight", "bias"]


@pytest.mark.parametrize("tap", [tap for tap in _taps.ALL if isinstance(tap, AttributeTap)], ids=lambda tap: tap.name)
def test_every_entry_point_is_found_in_this_torch_and_restored(tap: AttributeTap):
    places = tap._locate()
    assert places, f"{tap.name} is nowhere to be found"
    before = [vars(owner).get(name) for owner, name in places]
    handle = tap.subscribe(lambda inner: inner, order="record")
    assert tap.is_installed()
    assert all(vars(owner).get(name) is not old for (owner, name), old in zip(places, before, strict=True))
    handle.remove()
    assert [vars(owner).get(name) for owner, name in places] == before
    assert not tap.is_installed()


def test_handles_removed_by_many_threads_at_once_restore_the_original():
    original = lambda: 0  # noqa: E731
    owner = types.SimpleNamespace(f=original)
    tap = tap_on(owner, "f")

    def work():
        for _ in range(200):
            tap.subscribe(lambda inner: inner, order="measure").remove()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert owner.f is original


def test_a_child_forked_while_the_lock_is_held_can_still_subscribe():
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with _taps._tap.lock:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        tap_on(types.SimpleNamespace(f=int), "f").subscribe(lambda inner: inner, order="record").remove()
        os._exit(0)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
