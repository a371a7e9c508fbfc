"""Parts of a model begin to train at the step that was asked for, counted by the optimizer."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl
from gradctl import FreezeRefused, PatternMatchesNothing, UsageError, _taps


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(3))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x)
        return self.head(self.norm(x))


def trains(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name in gradctl.trainable(model).names()}


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


STEPS: dict[Any, int] = {"head": 0, "encoder.2": 2, ("encoder", "!encoder.0"): 5}


def expected_at(step: int, steps: dict[Any, int]) -> set[str]:
    named = dict.fromkeys(("encoder.0.0", "encoder.0.1", "encoder.1.0", "encoder.1.1", "encoder.2.0"), 0)
    found = set()
    for pattern, begin in steps.items():
        if begin <= step:
            if pattern == "head":
                found.add("head")
            elif pattern == "norm":
                found.add("norm")
            elif pattern == "encoder.2":
                found |= {"encoder.2.0", "encoder.2.1"}
            elif isinstance(pattern, tuple):
                found |= {"encoder.1.0", "encoder.1.1", "encoder.2.0", "encoder.2.1"}
            else:
                found |= {*named, "encoder.2.1"}
    return found


def test_what_begins_at_a_step_trains_from_that_step_on_and_the_rest_never() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    schedule = gradctl.unfreeze_by_step(STEPS).attach(model, optimizer)
    for step in range(8):
        assert schedule.step == step
        assert trains(model) == expected_at(step, STEPS)
        before = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
        train_a_step(model, optimizer)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.rpartition(".")[0] for name in moved} == expected_at(step, STEPS)  # statistics too
    schedule.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@given(
    st.dictionaries(st.sampled_from(["norm", "encoder.2", "encoder"]), st.integers(1, 6), max_size=3),
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
)
def test_loading_any_step_gives_the_flags_and_modes_of_a_run_that_came_there(
    later: dict[str, int], jumps: list[int]
) -> None:
    steps = {"head": 0, **later}
    if "encoder" in steps and "encoder.2" in steps and steps["encoder"] <= steps["encoder.2"]:
        steps["encoder.2"] = steps["encoder"] - 1
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradctl.unfreeze_by_step(steps, model=model, optimizer=optimizer) as schedule:
        for jump in jumps:
            schedule.load_state_dict({"step": jump})
            assert schedule.state_dict() == {"step": jump}
            assert trains(model) == expected_at(jump, steps)
            training = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)}
            assert {name for name in training if model.get_submodule(name).training} == training & trains(model)


def test_a_resumed_run_goes_on_where_it_was_whether_it_is_loaded_before_or_after_attaching() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = gradctl.unfreeze_by_step(STEPS)
    schedule.load_state_dict({"step": 4})
    with schedule.attach(model, optimizer):
        assert trains(model) == expected_at(4, STEPS)
        train_a_step(model, optimizer)
        assert trains(model) == expected_at(5, STEPS)


def test_microbatches_and_steps_that_the_scaler_skipped_do_not_count() -> None:
    for fused in (False, True):
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        with gradctl.unfreeze_by_step({"head": 0, "norm": 2}, model=model, optimizer=optimizer) as schedule:
            for finite in (False, True, False, False, True):
                for _ in range(3):
                    loss = model(torch.randn(8, 3)).sum()
                    scaler.scale(loss if finite else loss * float("inf")).backward()
                assert trains(model) == {"head"}
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            assert schedule.step == 2
            assert trains(model) == {"head", "norm"}


def test_without_an_optimizer_the_first_that_steps_and_holds_a_parameter_counts() -> None:
    model, other = Net(), nn.Linear(3, 1)
    schedule = gradctl.unfreeze_by_step({"head": 0, "norm": 1}, model=model)
    unrelated = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    train_a_step(other, unrelated)
    assert schedule.step == 0
    train_a_step(model, optimizer)
    train_a_step(model, second)
    assert schedule.step == 1
    assert trains(model) == {"head", "norm"}
    schedule.remove()
    assert _taps.installed() == []


def test_rest_keeps_the_flags_of_what_no_pattern_names() -> None:
    model = Net()
    model.encoder[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradctl.unfreeze_by_step({"norm": 1}, rest="keep", model=model, optimizer=optimizer):
        assert trains(model) == {"encoder.1.0", "encoder.1.1", "encoder.2.0", "encoder.2.1", "head"}
        train_a_step(model, optimizer)
        assert "norm" in trains(model)


def test_a_forgotten_schedule_goes_on_and_keeps_nothing_alive() -> None:
    for given_optimizer in (True, False):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradctl.unfreeze_by_step({"head": 0, "norm": 2}, model=model, optimizer=optimizer if given_optimizer else None)
        gc.collect()
        for _ in range(2):
            train_a_step(model, optimizer)
        assert trains(model) == {"head", "norm"}
        dead = weakref.ref(model)
        del model, optimizer
        assert dead() is None
        assert _taps.installed() == []


def test_it_says_what_trains() -> None:
    model = Net()
    schedule = gradctl.unfreeze_by_step(STEPS)
    assert "not attached" in str(schedule)
    schedule.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    schedule.load_state_dict({"step": 2})
    lines = [line.split() for line in str(schedule).splitlines()]
    assert lines[1:] == [
        ["from", "step", "0", "'head'", "trains"],
        ["from", "step", "2", "'encoder.2'", "trains"],
        ["from", "step", "5", "'encoder',", "'!encoder.0'", "frozen"],
        ["the", "rest", "stays", "frozen"],
    ]
    told = {row.name: row.why for row in gradctl.trainable(model).rows}
    assert told["encoder.1.0.weight"].startswith("frozen by unfreeze_by_step, until step 5 at ")
    assert told["norm.weight"].startswith("frozen by unfreeze_by_step, throughout at ")
    schedule.remove()


@pytest.mark.parametrize(
    ("steps", "error", "sentence"),
    [
        ({}, UsageError, "a dictionary from patterns to steps is needed"),
        (["head"], UsageError, "a dictionary from patterns to steps is needed"),
        ({"head": -1}, UsageError, "'head': -1"),
        ({"head": 0.5}, UsageError, "a whole number from 0 on"),
        ({"head": True}, UsageError, "a whole number from 0 on"),
        ({"head": 5}, FreezeRefused, "nothing trains before step 5"),
        ({"haed": 0}, PatternMatchesNothing, "did you mean 'head'"),
        ({"*": 0, "encoder.*": 5}, UsageError, r"'encoder\.\*': 5 unfreezes nothing"),
    ],
)
def test_a_schedule_that_cannot_hold_is_refused_and_nothing_is_changed(
    steps: Any, error: type[Exception], sentence: str
) -> None:
    model = Net()
    with pytest.raises(error, match=sentence):
        gradctl.unfreeze_by_step(steps, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert _taps.installed() == []


def test_what_the_optimizer_does_not_hold_is_refused_at_once_or_at_its_first_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(FreezeRefused, match=r"norm.weight and 1 more: not in SGD"):
        gradctl.unfreeze_by_step({"head": 0, "norm": 500}, model=model, optimizer=optimizer)
    schedule = gradctl.unfreeze_by_step({"head": 0, "norm": 500}, model=model)
    with pytest.raises(FreezeRefused, match="they would get gradients and never move"):
        train_a_step(model, optimizer)
    schedule.remove()


def test_a_schedule_is_attached_once_and_entered_when_it_is() -> None:
    model = Net()
    schedule = gradctl.unfreeze_by_step({"head": 0})
    with pytest.raises(UsageError, match="this schedule is not attached"), schedule:
        pass
    schedule.attach(model)
    with pytest.raises(UsageError, match="this schedule is attached already"):
        schedule.attach(model)
    schedule.remove()
    schedule.remove()
    for state in ({}, {"step": -1}, {"step": "3"}):
        with pytest.raises(UsageError, match="a whole number from 0 on"):
            schedule.load_state_dict(state)
    with pytest.raises(UsageError, match="rest='thawed'"):
        gradctl.unfreeze_by_step({"head": 0}, rest="thawed")  # type: ignore[arg-type]
