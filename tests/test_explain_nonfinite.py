"""`on_nonfinite="explain"`: what a recorded run says of the line behind its first NaN or inf gradient."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradctl
from starting import environment


class Careful(torch.optim.Optimizer):
    """Updates nothing with a gradient that is not finite, as a loss scaler does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        if all(bool(p.grad.isfinite().all()) for p in params):
            with torch.no_grad():
                for p in params:
                    p.sub_(p.grad, alpha=0.01)


def train(kind: type[torch.optim.Optimizer], bad: tuple[int, ...], steps: int = 12) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    for step in range(1, steps + 1):
        hidden = model(torch.randn(8, 4))
        if step in bad:
            hidden = hidden * 0
        loss = hidden.pow(2).sum(1).sqrt().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def recorded(
    folder: Path, kind: type[torch.optim.Optimizer], bad: tuple[int, ...], steps: int = 12
) -> list[dict[str, Any]]:
    with gradctl.record(folder / "run", report=False, on_nonfinite="explain", budget=1.0) as recording:
        train(kind, bad, steps)
    return [dict(event.data) for event in recording.journal.events if event.e == "explain"]


def test_a_nan_that_is_passed_over_and_comes_again_is_explained_by_its_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    [event] = recorded(tmp_path, Careful, (2, 5))
    [finding] = event["findings"]
    assert finding["slug"] == "nan_sqrt"
    line = Path(__file__).read_text(encoding="utf-8").splitlines()[finding["primary"]["line"] - 1]
    assert ".sqrt()" in line
    told = capfd.readouterr().err
    assert told.startswith("gradctl: step 2 had a gradient that is not finite; it came again: nan_sqrt at ")


def test_the_first_bad_step_is_named_and_each_is_counted_however_small_the_budget(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = (61, 63, 64, 70)
    with gradctl.record(tmp_path / "run", report=False, on_nonfinite="explain", budget=1e-6) as recording:
        train(Careful, bad, 70)
    seen = [event.n for event in recording.journal.events if event.e == "nonfinite" and event.data["what"] == "grad"]
    assert seen == list(bad)
    assert capfd.readouterr().err.startswith("gradctl: step 61 had a gradient that is not finite; ")


def test_a_nan_that_has_poisoned_the_weights_is_answered_by_the_command_that_finds_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    [event] = recorded(tmp_path, torch.optim.SGD, (3,))
    assert event["findings"] == []
    told = capfd.readouterr().err
    assert "its update has made 2 parameters NaN or inf" in told
    assert "gradctl explain --at-step 3 " in told


def test_a_nan_that_does_not_come_again_is_told_at_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [event] = recorded(tmp_path, Careful, (2,), steps=6)
    assert event["findings"] == []
    assert "it has not come again in the 4 steps that were traced after it" in capfd.readouterr().err


def test_a_healthy_run_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert recorded(tmp_path, torch.optim.SGD, ()) == []
    assert capfd.readouterr().err == ""


def test_the_command_line_knows_it_too(tmp_path: Path) -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    body = source[source.index("class Careful") : source.index("def recorded")]
    script = tmp_path / "careful.py"
    head = "from typing import Any\nimport torch\nfrom torch import nn\n"
    script.write_text(f"{head}{body}\ntrain(Careful, (2, 5))\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "gradctl", "run", "--no-report", "--budget", "1", "--on-nonfinite", "explain", script],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0
    assert "it came again: nan_sqrt at " in done.stderr
