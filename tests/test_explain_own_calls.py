"""Gradients that a program controls through gradctl's own calls are meant; a bug behind such a call is still found."""

from __future__ import annotations

from pathlib import Path

import pytest

from explained import findings, line_of
from own_call_programs import BUGS, HEALTHY


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
