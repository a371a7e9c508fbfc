"""The verdict on a recorded run: what the program keeps from a parameter by a call of gradctl is no fault of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gradctl
from gradctl._journal import Run, heard_by
from gradctl._verdict import Facts, judge_facts
from own_call_programs import HEALTHY, through

# What a detach had taken before gradctl was called, and zeros that only the backward knows of, no recorder can see.
UNSEEN = {
    "stop_after_an_older_detach",
    "replace_by_what_is_detached",
    "scale_by_a_zero_tensor",
    "straight_through_all_outside",
    "custom_vjp_of_zeros",
    "freeze_all_rows_that_are_used",
}


def faults(folder: Path, text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Record a program in this process; return the slugs of its warnings and errors, with the parameters."""
    script = folder / "program.py"
    script.write_text(text)
    names = {"__name__": "__main__"}
    with gradctl.record(folder / "run", report=False, quiet=True):
        exec(compile(text, str(script), "exec"), names)
    names.clear()
    found = judge_facts(Facts(Run.load(folder / "run"))).findings
    return [(f.slug, f.parameters) for f in found if f.severity != "note"]


@pytest.mark.parametrize("name", sorted(HEALTHY.keys() - UNSEEN))
def test_a_program_that_controls_its_gradients_by_gradctl_gets_no_warning(name: str, tmp_path: Path) -> None:
    assert faults(tmp_path, HEALTHY[name]) == []


def test_a_parameter_that_a_detach_cuts_off_is_told_beside_one_that_gradctl_stops(tmp_path: Path) -> None:
    text = through("gradctl.stop(h)").replace("torch.tanh(self.middle(h))", "torch.tanh(self.middle(h)).detach()")
    ((slug, parameters),) = faults(tmp_path, text)
    assert slug == "never-reached"
    assert [name.rpartition("net.")[2] for name in parameters] == ["middle.weight", "middle.bias"]


def test_a_net_that_trains_nothing_at_all_is_an_error_whoever_stops_it(tmp_path: Path) -> None:
    text = through("h").replace(
        "F.mse_loss(net(x), y)", "gradctl.stop(net(x)).mean() + torch.ones((), requires_grad=True)"
    )
    assert [slug for slug, _ in faults(tmp_path, text)] == ["no-gradient"]


def test_zeros_behind_a_dead_relu_are_told_where_gradctl_only_scales(tmp_path: Path) -> None:
    text = through("gradctl.scale(torch.relu(h - 2), 0.5)")
    assert "gradients-zero" in [slug for slug, _ in faults(tmp_path, text)]


def test_nobody_hears_a_stop_once_the_recording_is_over(tmp_path: Path) -> None:
    faults(tmp_path, HEALTHY["stop"])
    assert heard_by == []
    assert not gradctl.stop(torch.ones(2, requires_grad=True)).requires_grad
