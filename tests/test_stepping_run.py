"""The order of a step as `run`, `record`, `report` and `explain` tell it, and that watching it changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradctl
from flights import plain_and_recorded, recorded
from gradctl import _taps

PROGRAMS = Path(__file__).parent / "programs_stepping"
pytestmark = pytest.mark.usefixtures("no_optimizers_of_other_tests")


def gradctl_verb(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradctl", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=cwd,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_run_says_it_at_the_end_and_report_again_with_place_and_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gradctl_verb("run", "--out", out, PROGRAMS / "wrong" / "undivided_loss.py", cwd=tmp_path)
    assert done.returncode == 0
    assert "4 microbatches add up to one step, and the mean of each is not divided by 4" in done.stderr
    shown = gradctl_verb("report", out, cwd=tmp_path).stdout
    assert "at undivided_loss.py:16" in shown
    assert "\n          (loss / 4).backward()\n" in shown
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<code>undivided_loss.py:16</code>" in page
    assert "<code>(loss / 4).backward()</code>" in page
    summary = json.loads(gradctl_verb("report", out, "--json", "-", cwd=tmp_path).stdout)
    [found] = [finding for finding in summary["findings"] if finding["slug"] == "undivided-loss"]
    assert found["primary"] == {"file": "undivided_loss.py", "line": 16}


def test_explain_names_it_with_exit_code_1_and_runs_nothing_twice(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    text = (PROGRAMS / "wrong" / "clip_before_unscale.py").read_text(encoding="utf-8")
    script.write_text(text + "open('ran', 'a').write('once ')\n", encoding="utf-8")
    done = gradctl_verb("explain", "--json", "-", script, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "ran").read_text() == "once "
    [found] = json.loads(done.stdout)["findings"]
    assert (found["slug"], found["primary"]["line"]) == ("clip-before-unscale", 19)
    assert "scaler.unscale_(optimizer)" in found["fix"]


def test_explain_of_a_script_that_the_scaler_ended_names_the_line_and_the_error(tmp_path: Path) -> None:
    done = gradctl_verb("explain", PROGRAMS / "wrong" / "unscale_twice.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "unscale-twice   unscale_twice.py:16" in done.stdout
    assert "ended with RuntimeError: unscale_() has already been called" in " ".join(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accumulation", "amp", "gan", "lbfgs", "multi_task"])
def test_explain_of_a_healthy_program_is_clean(name: str, tmp_path: Path) -> None:
    done = gradctl_verb("explain", PROGRAMS / "right" / f"{name}.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_record_tells_it_too(tmp_path: Path) -> None:
    with warnings.catch_warnings(), gradctl.record(tmp_path / "out", quiet=True, report=False) as recording:
        warnings.simplefilter("ignore")
        model, optimizer = small()
        for i in range(12):
            F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1)).backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    assert "undivided-loss" in {finding["slug"] for finding in recording.summary()["findings"]}


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(steps: int) -> list[torch.Tensor]:
    """Everything that is listened to, in a healthy order; a step is skipped now and then."""
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-30)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    for i in range(2 * steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1)) * (1e30 if i % 40 < 2 else 1.0) / 2
        scaler.scale(loss).backward()
        if i % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:
                scheduler.step()
            optimizer.zero_grad()
    return [*(param.detach() for param in model.parameters()), torch.tensor(optimizer.param_groups[0]["lr"])]


def test_watching_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    plain, watched, journal = plain_and_recorded(tmp_path, lambda: train(160))
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert journal.named("order")
    assert journal.end is not None
    assert journal.end.faults == 0


def test_between_the_stretches_nothing_more_is_intercepted_than_by_the_recorder(tmp_path: Path) -> None:
    extra = {"zero_grad", "module_zero_grad", "scaler_call", "scaler_unscale", "scaler_update", "scheduler_moves"}
    seen: dict[int, set[str]] = {}
    with recorded(tmp_path):
        model, optimizer = small()
        for step in range(1, 40):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1)).backward()
            optimizer.step()
            seen[step] = extra & set(_taps.installed())
    assert seen[5] == extra
    assert seen[39] == set()
    assert _taps.installed() == []


def test_an_accumulating_program_is_watched_to_its_end(tmp_path: Path) -> None:
    with recorded(tmp_path) as flight:
        model, optimizer = small()
        for i in range(4 * 30 + 3):
            (F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1)) / 4).backward()
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    [left] = flight.journal.named("left")
    assert (left.data["count"], len(set(left.data["sites"]))) == (3, 1)


def test_a_fault_of_the_watch_reaches_no_program_and_ends_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradctl._record import _order

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("planted")

    monkeypatch.setattr(_order, "read_root", broken)
    with recorded(tmp_path) as flight:
        model, optimizer = small()
        for _ in range(8):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1)).backward()
            optimizer.step()
    assert [event.data["tier"] for event in flight.journal.named("tier_off")] == ["order"]
    assert flight.journal.end is not None
    assert flight.journal.end.steps == {0: 8}


def test_a_warning_of_the_scheduler_still_names_the_line_of_the_program(tmp_path: Path) -> None:
    with recorded(tmp_path), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, optimizer = small()
        torch.optim.lr_scheduler.StepLR(optimizer, 5).step()
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name]


def test_more_than_eight_optimizers_are_not_watched(tmp_path: Path) -> None:
    with recorded(tmp_path) as flight:
        pairs = [small() for _ in range(9)]
        for model, optimizer in pairs * 3:
            F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1)).backward()
            optimizer.step()
    assert flight.journal.named("order") == ()
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0


class Alone(torch.Tensor):
    """A tensor whose numbers only its own code may read, as those of a sharded one are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Alone:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was asked of it")


def test_a_norm_of_another_type_is_not_read(tmp_path: Path) -> None:
    from torch.nn.utils import clip_grad

    with recorded(tmp_path) as flight:
        model, optimizer = small()
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1)).backward()
            with pytest.raises(AssertionError, match="was asked of it"):  # by torch itself, and by nobody before it
                clip_grad._clip_grads_with_norm_([*model.parameters()], 1.0, Alone(torch.ones(())))
            optimizer.step()
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0
    assert flight.journal.named("order")
