"""Freezing beside the other parts of a step: precision, `Step`, checkpointing, and a generator with a discriminator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradctl


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.embed(index))


@pytest.mark.parametrize(
    "mode", ["fp32", "bf16-autocast", "fp16-scaled", "bf16-master", "bf16-kahan", "bf16-stochastic"]
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["whole", "rows"])
def test_frozen_weights_stand_still_in_every_precision(mode: Any, when: str, what: str) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def freeze() -> Any:
        return (
            gradctl.freeze(model, "embed") if what == "whole" else gradctl.freeze(model, rows={"embed.weight": [0, 1]})
        )

    def step() -> None:
        with attached.forward():
            loss = model(torch.arange(6)).float().square().mean()
        attached.scale(loss).backward()
        attached.collect()
        found_inf = attached.unscale()
        attached.step(optimizer)
        attached.update(found_inf)
        attached.zero_grad()

    frozen = freeze() if when == "before" else None
    options = {"allow_slow": True} if mode == "fp16-scaled" else {}
    attached = gradctl.precision(mode, **options).attach(model, optimizer)
    if frozen is None:
        step()
        frozen = freeze()
    before = model.embed.weight.detach().clone()
    for _ in range(3):
        step()
    kept = slice(None) if what == "whole" else slice(0, 2)
    assert torch.equal(model.embed.weight[kept], before[kept])
    assert what == "whole" or not torch.equal(model.embed.weight[2:], before[2:])
    frozen.remove()
    for _ in range(3):
        step()
    assert not torch.equal(model.embed.weight[kept], before[kept])
    attached.remove()


def test_a_schedule_counts_the_steps_of_step_and_not_its_microbatches() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = gradctl.Step(model, optimizer, accumulate=3)
    with gradctl.unfreeze_by_step({"head": 0, "embed": 2}, model=model, optimizer=optimizer) as schedule:
        for done in range(3):
            assert model.embed.weight.requires_grad is (done >= 2)
            step([torch.arange(6)] * 3, lambda index: model(index).square().mean())
        assert schedule.step == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_block_passes_gradients_and_keeps_none(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 1))
    with gradctl.freeze(model, "1"):
        hidden = checkpoint(model[1], model[0](torch.ones(2, 3)), use_reentrant=use_reentrant)
        model[2](hidden).sum().backward()
        assert [parameter.grad is not None for parameter in model.parameters()] == [
            True,
            True,
            False,
            False,
            True,
            True,
        ]


def test_a_generator_trains_through_a_frozen_discriminator_and_both_keep_their_own_gradients() -> None:
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    discriminator(generator(torch.randn(8, 2)).detach()).mean().backward()
    mine = [parameter.grad for parameter in discriminator.parameters()]
    values = [grad.clone() for grad in mine if grad is not None]
    with gradctl.freeze(discriminator, norm_stats=False, nothing_left="allow"):
        assert discriminator[1].training
        discriminator(generator(torch.randn(8, 2))).mean().backward()
    assert generator.weight.grad is not None
    for parameter, grad, value in zip(discriminator.parameters(), mine, values, strict=True):
        assert parameter.grad is grad
        assert torch.equal(value, parameter.grad)  # type: ignore[arg-type]
