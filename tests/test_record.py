"""The recorder against plain torch: what it says is what happened, and what happened is what would have happened."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flights import plain_and_recorded, recorded
from trainings import batches, losses_of, mlp, train_mlp


def test_losses_and_parameters_are_bitwise_those_of_the_plain_run(tmp_path: Path) -> None:
    plain, watched, journal = plain_and_recorded(tmp_path, lambda: train_mlp(40, clip=0.5))
    assert plain[0] == watched[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))
    assert journal.end is not None
    assert journal.end.faults == 0


def test_every_step_is_in_exactly_one_block(tmp_path: Path) -> None:
    _, (losses, _), journal = plain_and_recorded(tmp_path, lambda: train_mlp(40))
    steps = [n for block in journal.blocks for n in range(block.n, block.n + block.c)]
    assert steps == list(range(1, 41))
    assert journal.end is not None
    assert dict(journal.end.steps) == {0: 40}
    assert journal.end.backwards == 40
    mean = sum(block.loss[0] * block.c for block in journal.blocks if block.loss) / 40
    assert mean == pytest.approx(sum(losses) / 40, rel=1e-3)
    assert min(block.loss[1] for block in journal.blocks if block.loss) == pytest.approx(min(losses), rel=1e-3)


def test_the_first_and_the_last_loss_are_told_at_the_end(tmp_path: Path) -> None:
    _, (losses, _), journal = plain_and_recorded(tmp_path, lambda: train_mlp(40))
    assert journal.end is not None
    assert journal.end.losses[0] == pytest.approx((losses[0], losses[-1]), rel=1e-5)


def test_a_last_loss_that_is_not_finite_is_told_as_it_is(tmp_path: Path) -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with recorded(tmp_path) as flight:
        for factor in (2.0, 1.0, math.inf, math.nan):
            (weight.sum() * factor).backward()
            optimizer.step()
    assert flight.journal.end is not None
    first, last = flight.journal.end.losses[0]
    assert first == 6.0
    assert last is not None
    assert math.isnan(last)


def test_the_optimizer_is_described_with_names_that_nobody_gave(tmp_path: Path) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: train_mlp(4))
    record = journal.optimizers[0]
    assert record.cls == "AdamW"
    assert record.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert record.shapes == ((32, 20), (32,), (3, 32), (3,))
    assert record.numel == 20 * 32 + 32 + 32 * 3 + 3
    assert record.lr == (0.01,)
    assert record.source == "optimizer"


def test_accumulation_is_reported_as_observed(tmp_path: Path) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: train_mlp(6, accumulate=4))
    (event,) = journal.named("accumulation")
    assert event.data["microbatches"] == 4
    assert event.n == 1
    assert sum(block.microbatches for block in journal.blocks) == 24


def test_only_so_many_steps_are_recorded_when_asked(tmp_path: Path) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: train_mlp(20), watch_steps=6)
    assert journal.end is not None
    assert dict(journal.end.steps) == {0: 6}
    assert any("step 6" in what for what, _ in journal.end.not_seen)


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    with recorded(tmp_path) as flight:
        model = mlp()
        torch.optim.SGD(model.parameters(), lr=0.1)
        assert not flight.path.exists()


def test_a_loss_with_one_element_counts_and_a_vector_does_not(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with recorded(tmp_path) as flight:
        for _ in range(2):
            weight.mul(2.0).sum().reshape(1).backward()
            optimizer.step()
        for _ in range(2):
            weight.mul(2.0).backward(torch.ones(3))
            optimizer.step()
    assert set(losses_of(flight.journal)) == {6.0}
    assert sum(block.c for block in flight.journal.blocks if block.loss is None) == 2


def test_modes_of_the_program_never_see_the_recorder(tmp_path: Path) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Functions(TorchFunctionMode):
        calls: list[str]

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        calls: list[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    def train() -> tuple[list[str], list[str]]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        functions, operations = Functions(), Operations()
        functions.calls, operations.calls = [], []
        with functions, operations:
            for x, y in batches(6):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        return functions.calls, operations.calls

    plain, watched, journal = plain_and_recorded(tmp_path, train)
    assert watched == plain
    assert journal.end is not None
    assert journal.end.faults == 0
    assert all(block.loss is not None for block in journal.blocks)


def test_grad_mode_and_the_generators_are_as_they_were(tmp_path: Path) -> None:
    def train() -> tuple[bool, bool, Tensor]:
        train_mlp(9)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_rng_state()

    plain, watched, _ = plain_and_recorded(tmp_path, train)
    assert plain[:2] == watched[:2]
    assert torch.equal(plain[2], watched[2])


def test_losses_on_a_device_are_read_at_the_drain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradctl._record._losses.is_here", lambda tensor: False)
    clock = itertools.count(0, 0.01).__next__
    with recorded(tmp_path, clock=clock) as flight:
        flight.recorder._hot.scaled[-1] = (0, 0.0, 1.0)  # every loss is read the slow way
        losses, _ = train_mlp(20)
    assert losses_of(flight.journal) == pytest.approx(losses, rel=1e-3)


def test_the_end_says_that_only_so_many_steps_were_watched(tmp_path: Path) -> None:
    _, _, cut = plain_and_recorded(tmp_path, lambda: train_mlp(20), watch_steps=6)
    _, _, whole = plain_and_recorded(tmp_path, lambda: train_mlp(4), watch_steps=6)
    assert cut.end is not None
    assert whole.end is not None
    assert cut.end.tiers["watched"] == 6
    assert "watched" not in whole.end.tiers
