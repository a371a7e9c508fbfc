"""NaN, inf and the loss scale: what is told, in which step, and what is not taken for it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from flights import close, plain_and_recorded, recorded
from gradctl._errors import NonFiniteGradient
from trainings import batches, losses_of, mlp, poisoned


def scaled(steps: int, fused: bool = False, divide: int = 1) -> list[float]:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
    losses: list[float] = []
    for number, (x, y) in enumerate(batches(steps), 1):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item() / divide)
        (scaler.scale(loss) / divide if divide > 1 else scaler.scale(loss)).backward()
        if number == 7:
            next(iter(model.parameters())).grad[0, 0] = math.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("divide", [1, 4])
def test_the_loss_scale_is_undone(tmp_path: Path, divide: int) -> None:
    clock = itertools.count(0, 0.01).__next__  # each step takes long enough for a line of its own
    losses, _, journal = plain_and_recorded(tmp_path, lambda: scaled(5, divide=divide), clock=clock)
    assert losses_of(journal) == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_is_a_skip_and_not_a_bad_gradient(tmp_path: Path, fused: bool) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: scaled(12, fused=fused))
    (event,) = journal.named("skip")
    assert event.n == 7
    assert event.data["scale"] == 1024.0
    assert not journal.named("nonfinite")
    assert journal.end is not None
    assert journal.end.steps[0] == (12 if fused else 11)


def test_norms_under_a_fused_scaler_are_those_of_the_unscaled_gradients(tmp_path: Path) -> None:
    _, _, fused = plain_and_recorded(tmp_path, lambda: scaled(4, fused=True))
    _, _, apart = plain_and_recorded(tmp_path, lambda: scaled(4))
    for a, b in zip(fused.rows, apart.rows, strict=True):
        assert a.tot == pytest.approx(b.tot, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 7, 11])
def test_a_bad_gradient_is_named_in_the_step_it_appears_in(tmp_path: Path, at: int, value: float) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: poisoned(at, value=value))
    first = journal.named("nonfinite")[0]
    assert (first.n, first.o, first.data["what"]) == (at, 0, "grad")
    assert first.data["params"] == ["2.weight"]
    assert (first.data["count"], first.data["of"]) == (1, 4)


def test_stop_raises_before_the_update_is_applied(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path, on_nonfinite="stop") as flight:
        for number, (x, y) in enumerate(batches(9), 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            before = [p.detach().clone() for p in model.parameters()]
            if number == 9:
                model[0].bias.grad[0] = math.nan  # type: ignore[index, union-attr]
                with pytest.raises(NonFiniteGradient, match=r"0\.bias got a gradient that is NaN or inf in step 9"):
                    optimizer.step()
            else:
                optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0


def test_a_bad_loss_is_an_event_with_the_weights_that_are_bad_already(tmp_path: Path) -> None:
    def train() -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number, (x, y) in enumerate(batches(8), 1):
            if number == 5:
                with torch.no_grad():
                    model[0].weight[0, 0] = math.nan
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    _, _, journal = plain_and_recorded(tmp_path, train)
    found = {event.data["what"]: event for event in reversed(journal.named("nonfinite"))}
    assert found["loss"].n == 5
    assert found["weight"].data["params"] == ["0.weight"]
    assert found["grad"].n == 5
    assert sum(block.bad for block in journal.blocks) == 4


def test_gradients_whose_squares_overflow_are_not_called_bad(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with recorded(tmp_path) as flight:
        for _ in range(4):
            weight.grad = torch.full_like(weight, 1e25)
            optimizer.step()
    assert not flight.journal.named("nonfinite")
    assert all(close(row.g[0], 1e25 * math.sqrt(10)) for row in flight.journal.rows)


def test_a_bad_gradient_on_a_device_is_named_with_its_step_at_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradctl._record._quiet.is_here", lambda tensor: False)
    _, _, journal = plain_and_recorded(tmp_path, lambda: poisoned(21, steps=40))
    first = journal.named("nonfinite")[0]
    grads = [event for event in journal.named("nonfinite") if event.data["what"] == "grad"]
    assert first.data["what"] in ("grad", "loss")
    assert (grads[0].n, grads[0].data["params"]) == (21, ["2.weight"])
