"""Freezing below DDP and `fully_shard`: followed where that can be, refused with the right order where not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradctl
import settled
from gradctl import FreezeRefused

settled.compiling()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


def test_freezing_and_unfreezing_what_ddp_holds_is_refused_with_the_right_order(one_process: None) -> None:
    model = net()
    wrapped = DistributedDataParallel(model)
    for given in (model, wrapped):
        with pytest.raises(FreezeRefused) as caught:
            gradctl.freeze(given, "0")
        assert caught.value.headline == "0.weight is in DistributedDataParallel already"
        assert (caught.value.fix or "").startswith("freeze first, then wrap: gradctl.freeze(model, ...)")
    with pytest.raises(FreezeRefused, match="unfreeze first, then wrap"):
        gradctl.unfreeze(nn.ModuleList([model]), "0.0")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert gradctl.trainable(wrapped).names() == [name for name, _ in model.named_parameters()]


def test_frozen_first_and_wrapped_then_it_trains_and_cannot_be_removed_below_ddp(one_process: None) -> None:
    model = net()
    frozen = gradctl.freeze(model, "0", "1")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1, weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(wrapped, optimizer)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, False, False, True, True]
    with pytest.raises(FreezeRefused, match=r"0.weight is in DistributedDataParallel already"):
        frozen.remove()
    assert frozen.names
    assert not model[0].weight.requires_grad
    del wrapped
    frozen.remove()
    assert model[0].weight.requires_grad


def test_a_schedule_below_a_ddp_that_was_made_after_it_is_refused_at_the_first_step(one_process: None) -> None:
    model = net()
    schedule = gradctl.unfreeze_by_step({"2": 0, "0": 500}, model=model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with pytest.raises(FreezeRefused, match=r"0.weight is in DistributedDataParallel already"):
        train(wrapped, optimizer)
    del wrapped
    schedule.remove()


@pytest.mark.slow
@pytest.mark.distributed
def test_fully_shard_on_two_ranks_follows_the_flags_and_rows_are_refused(tmp_path: Path) -> None:
    program = Path(__file__).with_name("freeze_sharded.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), f"file://{tmp_path}/meet", str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        output, _ = process.communicate(timeout=100)
        assert (process.returncode, output.splitlines()[-1:]) == (0, ["all held"]), f"rank {rank}: {output}"
