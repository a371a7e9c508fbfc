"""Programs without an optimizer, or with one that is never stepped: their backwards are the steps."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flights import close, plain_and_recorded, recorded
from gradctl._errors import NonFiniteGradient
from gradctl._journal import Run
from trainings import batches, mlp, train_mlp

pytestmark = pytest.mark.usefixtures("no_optimizers_of_other_tests")


def by_hand(steps: int, *, bad_at: int | None = None, bad_gradient_at: int | None = None) -> list[float]:
    """A loop that updates its weight itself; returns the norm of the gradient of each step."""
    weight = torch.randn(20, 3, requires_grad=True)
    norms: list[float] = []
    for number in range(1, steps + 1):
        out = torch.ones(4, 20) @ weight
        if number == bad_gradient_at:
            loss = out.sum() + (weight[0, 0] * 0.0).sqrt()  # finite, and its gradient is not
        else:
            loss = out.pow(2).mean() * (math.nan if number == bad_at else 1.0)
        loss.backward()
        assert weight.grad is not None
        norms.append(float(weight.grad.norm()))
        with torch.no_grad():
            weight -= 0.01 * weight.grad
        weight.grad = None
    return norms


@pytest.mark.parametrize("at", [1, 2, 3, 21, 250])
def test_a_bad_loss_is_told_in_its_step(tmp_path: Path, at: int) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: by_hand(at + 5, bad_at=at))
    losses = [event for event in journal.named("nonfinite") if event.data["what"] == "loss"]
    grads = [event for event in journal.named("nonfinite") if event.data["what"] == "grad"]
    assert [event.n for event in losses] == list(range(at, at + 6))
    assert (losses[0].o, grads[0].n) == (0, at)
    assert journal.end is not None
    assert journal.end.faults == 0
    assert dict(journal.end.steps) == {0: at + 5}
    assert sum(block.microbatches for block in journal.blocks) == at + 5


@pytest.mark.parametrize("at", [1, 2, 3, 17])
def test_a_bad_gradient_of_a_finite_loss_is_told_in_its_step(tmp_path: Path, at: int) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: by_hand(at, bad_gradient_at=at))
    (event,) = journal.named("nonfinite")
    assert (event.n, event.data["what"]) == (at, "grad")
    assert dict(journal.end.steps) == {0: at}  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["bad_at", "bad_gradient_at"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 7, 250])
def test_stop_raises_in_the_backward_whose_gradient_is_bad(tmp_path: Path, at: int, kind: str) -> None:
    # A budget of nothing: without `stop` the norm would be taken every thousandth step.
    message = f"in step {at}"
    with (
        recorded(tmp_path, on_nonfinite="stop", budget=0.0) as flight,
        pytest.raises(NonFiniteGradient, match=message),
    ):
        by_hand(at + 5, **{kind: at})
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0


def test_accumulation_beside_an_optimizer_is_not_taken_for_steps_when_a_loss_is_bad(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path) as flight:
        made = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(8):
            (model(torch.ones(2, 4)).sum() * (math.nan if number == 2 else 1.0)).backward()
        made.step()
    del optimizer
    assert [record.source for record in flight.journal.optimizers.values()] == ["optimizer"]
    assert {event.n for event in flight.journal.named("nonfinite")} == {1}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_loop_too_short_to_be_decided_says_that_its_gradients_were_there(tmp_path: Path, steps: int) -> None:
    norms, _, journal = plain_and_recorded(tmp_path, lambda: by_hand(steps))
    assert not journal.named("none")
    assert journal.optimizers[0].shapes == () or journal.optimizers[0].numel == 60
    assert all(None not in row.g for row in journal.rows)
    assert dict(journal.end.steps) == {0: steps}  # type: ignore[union-attr]
    assert len(norms) == steps


def test_the_norm_of_a_loop_of_two_steps_is_the_larger_of_both(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(5))
    with recorded(tmp_path) as flight:
        for factor in (3.0, 2.0):
            (weight * factor).sum().backward()
            weight.grad = None
    (stretch,) = flight.journal.maxima
    assert (stretch.n, stretch.last, stretch.c) == (1, 2, 2)
    assert close(stretch.g[0], 3.0 * math.sqrt(5))


def forgotten(backwards: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(backwards):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).pow(2).mean().backward()


@pytest.mark.parametrize("backwards", [1, 2, 5, 300])
def test_an_optimizer_that_is_never_stepped_is_an_event(tmp_path: Path, backwards: int) -> None:
    with recorded(tmp_path) as flight:
        forgotten(backwards)
    (event,) = flight.journal.named("never_stepped")
    assert dict(event.data) == {"cls": "AdamW", "backwards": backwards, "count": 1}
    assert not flight.journal.named("none")
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0
    assert flight.journal.end.backwards == backwards


def test_no_optimizer_is_said_to_wait_when_one_stepped_or_a_scaler_skipped(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    with recorded(tmp_path) as flight:
        torch.optim.SGD([weight], lr=0.1)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        weight.sum().backward()
        optimizer.step()
    assert not flight.journal.named("never_stepped")
    with recorded(tmp_path) as flight:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer.zero_grad()
        scaler.scale((weight * math.inf).sum()).backward()
        scaler.step(optimizer)
    assert flight.journal.named("skip")
    assert not flight.journal.named("never_stepped")


def facts(flight: Any) -> dict[str, Any]:
    blocks = flight.journal.blocks
    return {
        "sources": [record.source for record in flight.journal.optimizers.values()],
        "steps": dict(flight.journal.end.steps),
        "covered": [n for block in blocks for n in range(block.n, block.n + block.c)],
        "microbatches": sum(block.microbatches for block in blocks),
        "losses": dict(flight.journal.end.losses),
        "backwards": flight.journal.end.backwards,
        "events": [(event.e, event.n) for event in flight.journal.events],
    }


@pytest.mark.parametrize("has_optimizer", [True, False])
def test_a_drain_between_two_backwards_changes_nothing_in_the_record(tmp_path: Path, has_optimizer: bool) -> None:
    def run(drains: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        with recorded(tmp_path) as flight:
            weight = nn.Parameter(torch.ones(3))
            optimizer = torch.optim.SGD([weight], lr=0.01) if has_optimizer else None
            for number in range(1, 17):
                weight.pow(2).sum().backward()
                if drains:
                    flight.recorder.drain()
                if optimizer is None:
                    with torch.no_grad():
                        weight -= 0.01 * weight.grad  # type: ignore[operator]
                elif number % 4 == 0:
                    optimizer.step()
        return facts(flight)

    assert run(drains=True) == run(drains=False)


def test_a_drain_after_every_step_leaves_exactly_that_many_steps(tmp_path: Path) -> None:
    from gradctl._journal import read

    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    with recorded(tmp_path, budget=0.0) as flight:
        for number in range(1, 700):
            weight.pow(2).sum().backward()
            optimizer.step()
            if number < 12 or number > 690:
                flight.recorder.drain()
                assert sum(block.c for block in read(flight.path).blocks) == number
    assert sum(block.c for block in flight.journal.blocks) == 699


def test_parameters_by_hand_are_bitwise_those_of_the_plain_run(tmp_path: Path) -> None:
    def train() -> list[Tensor]:
        weight = torch.randn(6, requires_grad=True)
        for _ in range(5):
            weight.pow(3).sum().backward()
            with torch.no_grad():
                weight -= 0.01 * weight.grad  # type: ignore[operator]
            weight.grad = None
        return [weight.detach().clone()]

    plain, watched, _ = plain_and_recorded(tmp_path, train)
    assert torch.equal(plain[0], watched[0])


@pytest.mark.parametrize("bad", [False, True])
def test_an_optimizer_older_than_the_recording_is_not_taken_for_none(tmp_path: Path, bad: bool) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path) as flight:
        for _ in range(3):
            for _ in range(4):
                (model(torch.ones(2, 4)).sum() * (math.nan if bad else 1.0)).backward()
            optimizer.step()
    assert [record.source for record in flight.journal.optimizers.values()] == ["optimizer"]
    assert sum(block.microbatches for block in flight.journal.blocks) == 12


def test_an_older_optimizer_of_something_else_is_no_reason_to_wait(tmp_path: Path) -> None:
    other = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    _, _, journal = plain_and_recorded(tmp_path, lambda: by_hand(7))
    assert dict(journal.end.steps) == {0: 7}  # type: ignore[union-attr]
    assert journal.rows
    assert not journal.named("never_stepped")
    del other


def train_by_hand(steps: int) -> list[Tensor]:
    weight = torch.randn(20, 3, requires_grad=True)
    for x, y in batches(steps):
        loss = nn.functional.cross_entropy(x @ weight, y)
        loss.backward()
        with torch.no_grad():
            weight -= 0.1 * weight.grad  # type: ignore[operator]
        weight.grad = None
    return [weight.detach().clone()]


@pytest.mark.parametrize("steps", [2, 3, 30])
def test_an_update_by_hand_is_recorded_by_its_backwards(tmp_path: Path, steps: int) -> None:
    plain, watched, journal = plain_and_recorded(tmp_path, lambda: train_by_hand(steps))
    assert torch.equal(plain[0], watched[0])
    record = journal.optimizers[0]
    assert record.source == "backward"
    assert journal.end is not None
    assert dict(journal.end.steps) == {0: steps}
    assert sum(block.c for block in journal.blocks) == steps
    assert sum(block.microbatches for block in journal.blocks) == steps
    assert all(block.loss is not None for block in journal.blocks)
    if steps == 30:
        assert record.shapes == ((20, 3),)
        assert journal.rows
        assert all(0.001 < ratio < 0.1 for row in journal.rows for ratio in row.u if ratio is not None)


def test_an_optimizer_that_accumulates_first_is_not_taken_for_none(tmp_path: Path) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: train_mlp(3, accumulate=8))
    assert [record.source for record in journal.optimizers.values()] == ["optimizer"]


def test_training_through_torch_func_is_reported_as_not_seen(tmp_path: Path) -> None:
    def train() -> None:
        weight = torch.randn(20, 3)
        for x, y in batches(5):
            weight -= 0.1 * torch.func.grad(lambda w: nn.functional.cross_entropy(x @ w, y))(weight)  # noqa: B023

    torch.manual_seed(0)
    with recorded(tmp_path) as flight:
        train()
    assert flight.journal.end is not None
    (entry,) = flight.journal.end.not_seen
    assert entry[0] == "training through torch.func"
    assert "5 times" in entry[1]


def test_steps_without_a_backward_are_reported_as_not_seen(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with recorded(tmp_path) as flight:
        for _ in range(4):
            weight.grad = torch.ones(3)
            optimizer.step()
    assert flight.journal.end is not None
    assert [what for what, _ in flight.journal.end.not_seen] == ["the backward"]


def test_nested_backwards_are_part_of_the_outer_one(tmp_path: Path) -> None:
    def train() -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches(5):
            optimizer.zero_grad()
            hidden = torch.utils.checkpoint.checkpoint(model[:2], x.requires_grad_(), use_reentrant=True)
            nn.functional.cross_entropy(model[2](hidden), y).backward()
            optimizer.step()

    _, _, journal = plain_and_recorded(tmp_path, train)
    assert journal.end is not None
    assert journal.end.backwards == 5


def test_a_gradient_penalty_counts_as_one_backward(tmp_path: Path) -> None:
    def train() -> list[Tensor]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches(5):
            optimizer.zero_grad()
            x.requires_grad_()
            loss = nn.functional.cross_entropy(model(x), y)
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + slope.pow(2).sum()).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    plain, watched, journal = plain_and_recorded(tmp_path, train)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert journal.end is not None
    assert journal.end.backwards == 5
    assert sum(block.microbatches for block in journal.blocks) == 5


def test_a_forked_child_whose_optimizer_never_steps_leaves_a_journal_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = (
        "import os, torch\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    weight = torch.nn.Parameter(torch.ones(3))\n"
        "    optimizer = torch.optim.SGD([weight], lr=0.1)\n"
        "    weight.sum().backward()\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    command = [sys.executable, "-m", "gradctl", "run", "--out", "out", "parent.py"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    (child,) = Run.load("out").children
    (event,) = child.named("never_stepped")
    assert event.data["backwards"] == 1
