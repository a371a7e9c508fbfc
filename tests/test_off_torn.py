"""A training step of another thread that the switch cuts in half is noticed; a whole one is silent."""

from __future__ import annotations

import gc
import json
import os
import queue
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradctl
import torn_race
from gradctl import TornStepWarning, _journal, _off
from gradctl._off import _torn

SECONDS = 20


class Net(nn.Module):
    """Two layers with a place to stop between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.between: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        self.between()
        return self.second(h).sum()


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


class Skipping(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.first(x).relu()
        self.between()
        return (h + self.second(h)).sum()


class Stop:
    """Where a thread waits until the main thread has turned the switch."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(SECONDS)


class Trainer(threading.Thread):
    """Runs `work` and keeps what it raised and what it warned of."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(name="trainer")
        self.work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error


def step(optimizer: Any, forward: Callable[[], torch.Tensor], order: str = "zero first") -> None:
    if order == "zero first":
        optimizer.zero_grad()
    loss = forward()
    if order == "zero before backward":
        optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if order == "zero last":
        optimizer.zero_grad()


def back_on(trainer: Trainer, stop: Stop, *, strict: bool) -> None:
    """Gradients are off when the trainer's forward begins and on again before it ends."""
    with gradctl.off(strict=strict):
        trainer.start()
        assert stop.reached.wait(SECONDS)
    stop.go_on.set()


def off_and_on(trainer: Trainer, stop: Stop, *, strict: bool) -> None:
    """Gradients go off and come on again in the middle of a forward of three parts, at a stop each."""
    trainer.start()
    assert stop.reached.wait(SECONDS)
    with gradctl.off(strict=strict):
        stop.reached.clear()
        stop.go_on.set()
        assert stop.reached.wait(SECONDS)
    stop.go_on.set()


def run(turn: Callable[..., None], trainer: Trainer, stop: Stop, *, strict: bool) -> list[str]:
    """Let the trainer run across the turn; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        turn(trainer, stop, strict=strict)
        trainer.join(SECONDS)
    assert not trainer.is_alive()
    others = [w for w in caught if w.category is not TornStepWarning]
    assert not others
    return [str(w.message) for w in caught]


def functional(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Run the net without any module's call."""
    h = torch.nn.functional.linear(x, net.first.weight, net.first.bias).relu()
    net.between()
    return torch.nn.functional.linear(h, net.second.weight, net.second.bias).sum()


def by_layers(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.first(x).relu()
    net.between()
    return net.second(h).sum()


X = torch.ones(2, 3)
FORWARDS = {
    "module": lambda net: net(X),
    "layers": lambda net: by_layers(net, X),
    "plain": lambda net: functional(net, X),
}


@pytest.fixture
def stop() -> Iterator[Stop]:
    stop = Stop()
    yield stop
    stop.go_on.set()


@pytest.mark.parametrize("order", ["zero first", "zero before backward", "zero last"])
@pytest.mark.parametrize("forward", list(FORWARDS))
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_forward_that_outlives_the_switch_is_noticed(stop: Stop, forward: str, order: str, kind: Any) -> None:
    net = Net()
    net.between = stop
    optimizer = kind(net.parameters(), lr=0.1)
    trainer = Trainer(lambda: step(optimizer, lambda: FORWARDS[forward](net), order))
    (message,) = run(back_on, trainer, stop, strict=False)
    assert "trainer" in message
    assert "2 of 4" in message
    assert trainer.error is None


@pytest.mark.parametrize("forward", list(FORWARDS))
def test_strict_stops_it_before_anything_is_applied(stop: Stop, forward: str) -> None:
    net = Net()
    net.between = stop
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = Trainer(lambda: step(optimizer, lambda: FORWARDS[forward](net)))
    assert run(back_on, trainer, stop, strict=True) == []
    assert isinstance(trainer.error, gradctl.TornStep)
    assert "test_off_torn.py" in str(trainer.error)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    net.between = lambda: None
    step(optimizer, lambda: net(X))  # the next step is whole, and silent


@pytest.mark.parametrize("kind", [Tied, Skipping])
def test_tied_weights_and_skip_connections_hide_nothing(stop: Stop, kind: type[Net]) -> None:
    net = kind()
    net.between = stop
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = Trainer(lambda: step(optimizer, lambda: net(X)))
    assert len(run(back_on, trainer, stop, strict=False)) == 1


class Deep(nn.Module):
    """Three layers, a stop before and after the middle one."""

    def __init__(self, stop: Stop, calls: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.stop = stop
        self.stops = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x + layer(x)
            if number < 2 and self.stops:
                self.stops -= 1
                self.stop()
                if self.stops:
                    self.stop.go_on.clear()
        return x.sum()


def test_off_and_on_again_inside_of_one_forward_is_noticed() -> None:
    stop = Stop()
    net = Deep(stop)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        if net.stops:
            net.stops, kept = 0, net.stops
            step(optimizer, lambda: net(X))  # an uncut step first
            net.stops = kept

    def forward() -> torch.Tensor:
        x = X
        x = x + net.layers[0](x)
        stop.reached.set()
        assert stop.go_on.wait(SECONDS)
        stop.go_on.clear()
        x = x + net.layers[1](x)
        stop.reached.set()
        assert stop.go_on.wait(SECONDS)
        return (x + net.layers[2](x)).sum()

    trainer = Trainer(lambda: step(optimizer, forward))
    (message,) = run(off_and_on, trainer, stop, strict=False)
    assert "4 of 6" in message


def test_the_event_names_the_thread_and_the_line(stop: Stop, tmp_path: Any) -> None:
    net = Net()
    net.between = stop
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = Trainer(lambda: step(optimizer, lambda: net(X)))
    writer = _journal.JournalWriter(tmp_path / "journal.rank0.jsonl")
    before = _journal.current()
    _journal.set_current(writer)
    try:
        run(back_on, trainer, stop, strict=False)
    finally:
        _journal.set_current(before)
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "journal.rank0.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line.get("e") == "torn_step"]
    assert event["thread"] == "trainer"
    assert os.path.basename(__file__) in event["site"]


# ---------------------------------------------------------------- silence


def test_the_owners_own_steps_are_silent() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    idle = threading.Event()
    other = threading.Thread(target=lambda: idle.wait(SECONDS))
    other.start()
    before = [p.detach().clone() for p in net.parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = net(X)
        loss.backward()
        with gradctl.off(strict=True):
            net(X)
        optimizer.step()
        optimizer.zero_grad()
        with gradctl.off(strict=True):
            z = net.first(X)
        net.second(z).sum().backward()
        optimizer.step()
    idle.set()
    other.join()
    assert [str(warning.message) for warning in caught] == []
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def turn_at(trainer: Trainer, stop: Stop, *, strict: bool) -> None:
    """Turn the switch, both ways, while the trainer waits."""
    trainer.start()
    assert stop.reached.wait(SECONDS)
    with gradctl.off(strict=strict):
        pass
    stop.go_on.set()


class Unused(Net):
    """Has a layer that no loss ever reaches, as many published models do."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(3, 3)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", [Net, Unused])
def test_a_thread_that_waits_for_work_at_the_turn_is_silent(stop: Stop, kind: type[Net], strict: bool) -> None:
    net = kind()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    jobs: queue.Queue[torch.Tensor] = queue.Queue()

    def work() -> None:
        stop.reached.set()
        x = jobs.get(timeout=SECONDS)
        step(optimizer, lambda: net(x))

    def turn(trainer: Trainer, stop: Stop, *, strict: bool) -> None:
        trainer.start()
        assert stop.reached.wait(SECONDS)
        with gradctl.off(strict=strict):
            pass
        jobs.put(X)

    trainer = Trainer(work)
    assert run(turn, trainer, stop, strict=strict) == []
    assert trainer.error is None


@pytest.mark.parametrize("kind", [Net, Unused])
def test_a_thread_that_waits_on_an_event_between_steps_is_silent(stop: Stop, kind: type[Net]) -> None:
    net = kind()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)

    def work() -> None:
        step(optimizer, lambda: net(X))
        stop()
        step(optimizer, lambda: net(X))

    trainer = Trainer(work)
    assert run(turn_at, trainer, stop, strict=True) == []
    assert trainer.error is None


def test_a_thread_between_backward_and_step_is_silent(stop: Stop) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def work() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            net(X).backward()
            stop()
            optimizer.step()

    trainer = Trainer(work)
    assert run(turn_at, trainer, stop, strict=True) == []
    assert trainer.error is None


def test_a_thread_that_evaluates_at_the_turn_and_then_trains_is_silent(stop: Stop) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def work() -> None:
        net.between = stop
        with torch.no_grad():
            net(X)
        net.between = lambda: None
        loss = net(X)
        loss.backward()
        optimizer.step()

    trainer = Trainer(work)
    assert run(turn_at, trainer, stop, strict=True) == []
    assert trainer.error is None


def test_a_target_network_that_is_evaluated_at_the_turn_is_silent(stop: Stop) -> None:
    net, target = Net(), Net()
    target.between = stop
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def work() -> None:
        for _ in range(3):
            with torch.no_grad():
                goal = target(X)
            step(optimizer, lambda goal=goal: (net(X) - goal).square())

    trainer = Trainer(work)
    assert run(turn_at, trainer, stop, strict=True) == []
    assert trainer.error is None


def test_a_thread_that_serves_and_never_steps_is_silent_and_keeps_nothing(stop: Stop) -> None:
    nets = [Net()]
    nets[0].between = stop
    trainer = Trainer(lambda: nets[0](X))
    assert run(turn_at, trainer, stop, strict=True) == []
    gone = weakref.ref(nets.pop())
    gc.collect()
    assert gone() is None


def test_a_gan_whose_generator_runs_at_the_turn_is_judged_by_its_own_step(stop: Stop) -> None:
    generator, critic = Net(), Net()
    generator.second = nn.Linear(3, 3)
    generator.forward = lambda x: generator.second(cut(generator.first(x)))  # type: ignore[method-assign]

    def cut(h: torch.Tensor) -> torch.Tensor:
        generator.between()
        return h

    generator.between = stop
    of_generator = torch.optim.SGD(generator.parameters(), lr=0.1)
    of_critic = torch.optim.SGD(critic.parameters(), lr=0.1)

    def work() -> None:
        of_critic.zero_grad()
        fake = generator(X)
        critic(fake.detach()).backward()
        of_critic.step()  # whole
        of_generator.zero_grad()
        critic(fake).backward()
        of_generator.step()  # cut

    trainer = Trainer(work)
    (message,) = run(back_on, trainer, stop, strict=False)
    assert "2 of 4" in message


def test_a_half_recorded_matrix_product_is_refused_instead_of_run() -> None:
    """Its saved strides are empty, and libtorch reads them; here the emptiness is made by hand."""

    class Leaf:
        next_functions = ((None, 0), (torch.ones(1, requires_grad=True).exp().grad_fn, 0), (None, 0))

    class Node:
        _saved_mat1_sym_sizes = (3, 4)
        _saved_mat1_sym_strides: tuple[int, ...] = ()
        next_functions: tuple[Any, ...] = ((None, 0), (Leaf(), 0), (None, 0))

        def name(self) -> str:
            return "AddmmBackward0"

    class Loss:
        grad_fn = Node()

    ran: list[int] = []
    _torn._marks.clear()
    backward = _torn._watch_backward(lambda *arguments: ran.append(1))
    _torn._looked[threading.get_ident()] = _torn._turns - 1
    with pytest.raises(gradctl.TornStep, match="cut in half"):
        backward((Loss(),))
    assert not ran


@settings(max_examples=4)
@given(seed=st.integers(0, 2**16))
def test_turns_that_overlap_no_step_raise_no_alarm(seed: int) -> None:
    """Trainers hold a lock for a whole step, and the switch is turned with that lock held."""
    rng, lock, stop = random.Random(seed), threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def train(kind: type[Net], make: Any) -> None:
        net = kind()
        optimizer = make(net.parameters(), lr=0.01)
        steps = 0
        try:
            while not stop.is_set() or steps < 2:
                with lock:
                    step(optimizer, lambda: net(X), rng.choice(["zero first", "zero before backward", "zero last"]))
                steps += 1
        except BaseException as error:
            errors.append(error)

    kinds = [(Net, torch.optim.SGD), (Skipping, torch.optim.Adam), (Tied, torch.optim.SGD)]
    threads = [threading.Thread(target=train, args=kind) for kind in kinds]
    for thread in threads:
        thread.start()
    try:
        for _ in range(500):
            with lock, gradctl.off(strict=True):
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def test_a_free_race_misses_few_and_alarms_only_at_partial_gradients() -> None:
    race = torn_race.run(2, seed=0)
    assert race.toggles > 5
    assert race.steps > 10
    assert race.false_alarms == 0
    assert race.noticed >= 0.9 * race.partial


def test_nothing_listens_before_the_first_turn_beside_another_thread() -> None:
    _off.uninstall()
    with gradctl.off():
        pass
    assert len(_torn._handles) == (0 if len(sys._current_frames()) == 1 else 3)
