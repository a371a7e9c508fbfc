"""The loss scale: torch.amp.GradScaler's results, bit by bit, and one found_inf for all optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl
from gradctl._journal import JournalWriter, read, set_current

FACTORS: dict[str, Any] = {"init_scale": 2.0**14, "growth_interval": 3, "growth_factor": 2.5, "backoff_factor": 0.3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(count: int = 14) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    found = [(torch.randn(12, 8), torch.randint(0, 3, (12,))) for _ in range(count)]
    for number in {4, 5, 9} & set(range(count)):
        found[number][0][0, 0] = float("inf")
    return found


def test_fp16_scaled_is_a_gradscaler_loop_bit_by_bit_overflows_and_growth_included() -> None:
    ours, theirs = network(), network()
    optimizer, other = (torch.optim.AdamW(model.parameters(), lr=0.01) for model in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", **FACTORS)
    scales = []
    with gradctl.precision("fp16-scaled", allow_slow=True, **FACTORS).attach(ours, optimizer) as attached:
        for x, y in batches():
            attached.zero_grad()
            with attached.forward():
                loss = nn.functional.cross_entropy(ours(x), y)
            attached.scale(loss).backward()
            attached.collect()
            skip = bool(attached.unscale())
            if not skip:
                attached.step(optimizer)
            attached.update(skip)

            other.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(theirs(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(other)
            scaler.step(other)
            scaler.update()
            for mine, peer in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(mine, peer)
                assert mine.grad is not None
                assert skip or torch.equal(mine.grad, peer.grad)
            scales.append(attached.loss_scale)
            assert attached.loss_scale == scaler.get_scale()
        kept = attached.state_dict()["loss_scale"]
        assert kept == scaler.state_dict()
    assert max(scales) > 2.0**14 > min(scales), "it grew and it backed off"


def test_an_inf_for_one_of_two_optimizers_is_found_for_both() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    before = [p.detach().clone() for p in model.parameters()]
    with gradctl.precision("fp16-scaled", allow_slow=True).attach(model, *optimizers) as attached:
        for number, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, float("inf") if number == 3 else 1.0)
        found_inf = attached.unscale()
        assert found_inf.dtype is torch.float32
        assert found_inf.shape == ()
        assert found_inf.item() == 1.0
        attached.update(found_inf)
        assert attached.loss_scale == 2.0**15
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_the_peer_steps_the_other_optimizer() -> None:
    """What a plain GradScaler does with the same gradients: half of the model is updated, half is not."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float("inf") if number == 3 else 1.0)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert [torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("mode", ["fp32", "bf16-autocast", "bf16-master", "bf16-kahan"])
def test_a_mode_without_a_scale_leaves_loss_and_gradients_and_still_finds_inf(mode: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradctl.precision(mode).attach(model, optimizer) as attached:
        loss = torch.tensor(2.0)
        assert attached.scale(loss) is loss
        assert not attached.scales
        assert attached.loss_scale == 1.0
        with attached.forward():
            value = model(torch.randn(3, 8)).float().square().sum()
        value.backward()
        attached.collect()
        before = [g.clone() for g in attached.gradients()]
        assert attached.unscale().item() == 0.0
        assert all(torch.equal(a, b) for a, b in zip(before, attached.gradients(), strict=True))
        attached.gradients()[2].view(-1)[1] = float("nan")
        assert attached.unscale().item() == 1.0


def test_the_state_resumes_in_the_middle_of_a_growth_interval_and_reads_a_gradscalers() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = gradctl.precision("fp16-scaled", allow_slow=True, **FACTORS)
    with precision.attach(model, optimizer) as first:
        for skip in (False, True, False, False):
            first.update(skip)
        kept = first.state_dict()
    with precision.attach(model, optimizer) as second:
        second.load_state_dict(kept)
        assert second.loss_scale == first.loss_scale
        second.update(False)
        assert second.loss_scale == torch.tensor(first.loss_scale * 2.5).item(), "the third finite step grows it"
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    with precision.attach(model, optimizer) as third:
        third.load_state_dict({"mode": "fp16-scaled", "loss_scale": scaler.state_dict()})
        assert third.loss_scale == 512.0


def test_a_sparse_gradient_is_unscaled_by_its_values() -> None:
    model = nn.Embedding(6, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradctl.precision("fp16-scaled", allow_slow=True, init_scale=4.0).attach(model, optimizer) as attached:
        attached.scale(model(torch.tensor([1, 1, 4])).sum()).backward()
        assert attached.unscale().item() == 0.0
        assert model.weight.grad is not None
        assert torch.equal(model.weight.grad.to_dense()[:, 0], torch.tensor([0.0, 2, 0, 0, 1, 0]))


def test_every_move_of_the_scale_is_an_event_of_the_journal(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer = JournalWriter(tmp_path / "journal.rank0.jsonl")
    writer.write("run", schema="gradctl.journal/1")
    set_current(writer)
    try:
        with gradctl.precision("fp16-scaled", allow_slow=True, init_scale=8.0, growth_interval=2).attach(
            model, optimizer
        ) as attached:
            for skip in (True, False, False, False):
                attached.update(skip)
    finally:
        set_current(None)
        writer.close()
    told = [event.data for event in read(tmp_path / "journal.rank0.jsonl").named("loss_scale")]
    assert told == [{"scale": 4.0, "was": 8.0, "why": "overflow"}, {"scale": 8.0, "was": 4.0, "why": "growth"}]


def test_a_recorder_hears_a_skip_and_sees_the_loss_without_its_scale(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with (
        gradctl.record(out=tmp_path / "run", report=False),
        gradctl.precision("fp16-scaled", allow_slow=True).attach(model, optimizer) as attached,
    ):
        for x, y in batches(8):
            attached.zero_grad()
            with attached.forward():
                loss = nn.functional.cross_entropy(model(x), y)
            attached.scale(loss).backward()
            attached.collect()
            skip = bool(attached.unscale())
            attached.skip(optimizer) if skip else attached.step(optimizer)
            attached.update(skip)
            losses.append(loss.item())
    journal = read(tmp_path / "run" / "journal.rank0.jsonl")
    assert len(journal.named("skip")) == 2
    assert journal.end is not None
    first, last = next(iter(journal.end.losses.values()))
    assert first == pytest.approx(losses[0], rel=1e-3)
    assert last == pytest.approx(losses[-1], rel=1e-3)
