"""Gradients that a program controls through gradctl's own calls are meant; a bug behind such a call is still found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradctl
from explained import findings, line_of
from own_call_programs import BUGS, HEALTHY
from starting import Outcome, launch


@pytest.mark.parametrize("name", HEALTHY)
def test_what_a_call_of_gradctl_keeps_from_a_parameter_is_no_finding(name: str, tmp_path: Path) -> None:
    found = findings(tmp_path, HEALTHY[name])
    assert [(f.slug, f.primary, f.symptom) for f in found] == []


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_behind_a_call_of_gradctl_is_found_at_its_line(name: str, tmp_path: Path) -> None:
    slug, text = BUGS[name]
    found = findings(tmp_path, text)
    assert [(f.slug, f.primary.line if f.primary else None) for f in found[:1]] == [(slug, line_of(text))]


ALL_STOPPED = """\
import torch
import gradctl
w = torch.nn.Parameter(torch.ones(3))
loss = gradctl.stop((w * w).sum())  # cause
loss.backward()
"""
ALL_FROZEN = """\
import torch
import gradctl
net = torch.nn.Linear(3, 1)
gradctl.freeze(net, nothing_left="allow")  # cause
net(torch.ones(2, 3)).sum().backward()
"""


def test_a_loss_that_is_stopped_as_a_whole_is_said_to_be_a_constant_of_gradctl(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, ALL_STOPPED, may_raise=True)
    assert found.primary is not None
    assert found.primary.line == line_of(ALL_STOPPED)
    assert found.why.startswith("a call of gradctl, for example stop(), returns a constant here")
    assert found.fix == "leave one way from the parameters without it"


def test_a_loss_of_what_gradctl_has_frozen_is_said_to_be_frozen_by_it(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, ALL_FROZEN, may_raise=True)
    assert found.slug == "frozen_params"
    assert found.primary is not None
    assert found.primary.line == line_of(ALL_FROZEN)
    assert "2 parameters behind the loss are frozen here by gradctl.freeze" in found.why


def test_notes_do_not_mention_what_gradctl_stops(tmp_path: Path) -> None:
    text = HEALTHY["stop_of_one_way"]
    assert findings(tmp_path, text, notes=True) == []


class Net(nn.Module):
    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.through(torch.tanh(self.tower(x))))


CONTROLS: dict[str, Callable[[Tensor], Tensor]] = {
    "stop": gradctl.stop,
    "scale": lambda h: gradctl.scale(h, 0),
    "replace": lambda h: gradctl.replace(h, gradient_of=torch.zeros_like(h)),
}


def train(net: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.ones(3, 4)).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", CONTROLS)
def test_watch_is_silent_about_a_call_of_gradctl(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(CONTROLS[name])
    with gradctl.watch(net) as watched:
        train(net, 5)
    assert list(watched.findings) == []
    assert "cause" not in capsys.readouterr().err


@pytest.mark.parametrize("name", CONTROLS)
def test_explaining_a_step_is_silent_about_a_call_of_gradctl(name: str) -> None:
    net = Net(CONTROLS[name])
    assert list(gradctl.explain(lambda: net(torch.ones(3, 4)).pow(2).mean(), net)) == []


def test_explaining_a_step_finds_the_detach_in_front_of_a_call_of_gradctl() -> None:
    net = Net(lambda h: gradctl.scale(h.detach(), 0.5))
    found = gradctl.explain(lambda: net(torch.ones(3, 4)).pow(2).mean(), net)
    assert [f.slug for f in found] == ["detach"]


def explained(folder: Path, text: str) -> Outcome:
    (folder / "train.py").write_text(text, encoding="utf-8")
    return launch([sys.executable, "-m", "gradctl", "explain", "train.py"], folder)


def test_the_command_calls_a_program_clean_that_stops_a_gradient_with_gradctl(tmp_path: Path) -> None:
    done = explained(tmp_path, HEALTHY["stop_in_a_helper"])
    assert done.code == 0, done.stdout
    assert "nothing is wrong with the gradients of 24 steps" in done.stdout


def test_the_command_names_the_detach_beside_what_gradctl_stops(tmp_path: Path) -> None:
    _, text = BUGS["a detach beside a stop"]
    done = explained(tmp_path, text)
    assert done.code == 1
    assert f"cause     detach   train.py:{line_of(text)}\n" in done.stdout
