"""Updates that round to nothing are seen, named, and not seen where nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradctl
from gradctl._journal import read
from gradctl._precision import StallWatch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 16, generator=generator), torch.randint(0, 4, (32,), generator=generator)


def plain_bf16(rate: float, steps: int) -> tuple[nn.Module, StallWatch]:
    model = network().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    watch = StallWatch(dict(model.named_parameters()))
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x.bfloat16()).float(), y).backward()
        watch.before()
        optimizer.step()
        watch.after()
    return model, watch


def test_plain_bfloat16_at_a_small_rate_is_named_with_its_share() -> None:
    _, watch = plain_bf16(1e-4, 3)
    stall = watch.found()
    assert stall is not None
    assert set(stall.parameters) >= {"0.weight", "2.weight"}
    assert stall.of == 4
    assert 0.5 < stall.share <= 1.0
    assert str(stall).startswith(f"in {len(stall.parameters)} of 4 16-bit weights")
    assert 'gradctl.precision("bf16-master")' in str(stall)


def test_nothing_is_said_after_two_looks_nor_at_a_rate_that_moves_the_weights() -> None:
    assert plain_bf16(1e-4, 2)[1].found() is None
    assert plain_bf16(0.5, 3)[1].found() is None


def test_float32_weights_are_not_looked_at() -> None:
    watch = StallWatch(dict(network().named_parameters()))
    assert not watch.sees_anything
    watch.before()
    watch.after()
    assert watch.found() is None


def test_a_weight_without_a_gradient_or_with_a_zero_one_does_not_stall() -> None:
    model = network().bfloat16()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    watch = StallWatch(dict(model.named_parameters()))
    for _ in range(3):
        watch.before()
        watch.after()
    assert watch.found() is None


def recorded(tmp_path: Path, mode: Any, rate: float) -> list[Any]:
    """Train for a while as a recorded program does, plainly in bfloat16 or by a precision; return the stall events."""
    model = network() if mode else network().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    x, y = batch()
    attached = gradctl.precision(mode).attach(model, optimizer) if mode else None
    with gradctl.record(out=tmp_path / "run", report=False):
        for _ in range(30):
            optimizer.zero_grad()
            if attached is None:
                cross_entropy(model(x.bfloat16()).float(), y).backward()
                optimizer.step()
                continue
            with attached.forward():
                loss = cross_entropy(model(x).float(), y)
            loss.backward()
            attached.collect()
            attached.step(optimizer)
    if attached is not None:
        attached.remove()
    return list(read(tmp_path / "run" / "journal.rank0.jsonl").named("stall"))


def test_a_recorded_run_names_the_stall_of_plain_bfloat16(tmp_path: Path) -> None:
    events = recorded(tmp_path, None, 1e-4)
    assert events
    assert set(events[-1].data["params"]) >= {"0.weight", "2.weight"}


@pytest.mark.parametrize("mode", ["bf16-master", "bf16-kahan", "bf16-stochastic"])
def test_a_recorded_run_sees_no_stall_where_no_update_is_lost(tmp_path: Path, mode: Any) -> None:
    assert recorded(tmp_path, mode, 1e-4) == []
