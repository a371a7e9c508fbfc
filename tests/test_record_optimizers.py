"""Which optimizers there are, what they hold, and what is told of their parameters."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flights import plain_and_recorded, recorded
from trainings import batches, mlp


def test_parameters_without_a_gradient_are_named_until_they_get_one(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "late": nn.Linear(4, 4), "never": nn.Linear(4, 4)})
    model["never"].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path) as flight:
        for number in range(8):
            optimizer.zero_grad()
            out = model["used"](torch.ones(2, 4))
            if number >= 5:
                out = model["late"](out)
            out.sum().backward()
            optimizer.step()
    early, late = flight.journal.named("none")
    assert early.n == 3
    assert early.data["params"] == ["late.weight", "late.bias", "never.weight"]
    assert late.data["params"] == ["never.weight"]
    assert flight.journal.rows[0].none == 4
    assert flight.journal.rows[0].g[2:] == (None, None, None, None)
    assert flight.journal.optimizers[0].frozen == 1


def test_a_parameter_outside_every_optimizer_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with recorded(tmp_path) as flight:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    (event,) = flight.journal.named("unoptimized")
    assert set(event.data["params"]) == {"0.weight", "0.bias"}


def test_two_optimizers_are_told_apart(tmp_path: Path) -> None:
    def gan() -> list[Tensor]:
        generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)
        first = torch.optim.Adam(generator.parameters(), lr=1e-3)
        second = torch.optim.SGD(critic.parameters(), lr=1e-2)
        for _ in range(10):
            noise, real = torch.randn(8, 4), torch.randn(8, 4)
            second.zero_grad()
            critic(real).mean().backward()
            (-critic(generator(noise).detach()).mean()).backward()
            second.step()
            first.zero_grad()
            critic(generator(noise)).mean().backward()
            first.step()
        return [p.detach().clone() for m in (generator, critic) for p in m.parameters()]

    plain, watched, journal = plain_and_recorded(tmp_path, gan)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert [record.cls for record in journal.optimizers.values()] == ["SGD", "Adam"]
    assert journal.end is not None
    assert dict(journal.end.steps) == {0: 10, 1: 10}
    microbatches = {o: sum(b.microbatches for b in journal.blocks if b.o == o) for o in (0, 1)}
    assert microbatches == {0: 20, 1: 10}


def test_two_optimizers_after_one_backward_share_its_loss(tmp_path: Path) -> None:
    model = mlp()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with recorded(tmp_path) as flight:
        for x, y in batches(6):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            first.step()
            second.step()
    for o in (0, 1):
        assert sum(b.microbatches for b in flight.journal.blocks if b.o == o) == 6
        assert all(b.loss is not None for b in flight.journal.blocks if b.o == o)


def test_lbfgs_is_read_after_its_closure(tmp_path: Path) -> None:
    norms: list[float] = []

    def train() -> list[Tensor]:
        norms.clear()
        model = nn.Linear(5, 1)
        x = torch.randn(32, 5)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
            norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()))
        return [p.detach().clone() for p in model.parameters()]

    plain, watched, journal = plain_and_recorded(tmp_path, train)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert [row.tot for row in journal.rows] == pytest.approx(norms, rel=1e-3)
    assert journal.end is not None
    assert sum(b.microbatches for b in journal.blocks) == journal.end.backwards > 3


def test_groups_added_later_are_described_again(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with recorded(tmp_path) as flight:
        for number, (x, y) in enumerate(batches(12), 1):
            if number == 7:
                optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    record = flight.journal.optimizers[0]
    assert record.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert record.groups == (0, 0, 1, 1)
    assert record.lr == (0.1, 0.5)
    assert not flight.journal.named("unoptimized")


def test_a_stall_of_low_precision_updates_is_an_event(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    moving = nn.Parameter(torch.ones(64, 64))
    optimizer = torch.optim.SGD([weight, moving], lr=1e-4)
    with recorded(tmp_path) as flight:
        for _ in range(10):
            optimizer.zero_grad()
            (weight.float().sum() + moving.sum()).backward()
            optimizer.step()
    (event,) = flight.journal.named("stall")
    assert event.data["count"] == 1
    assert event.data["share"] == 1.0


def test_threads_that_train_are_kept_apart(tmp_path: Path) -> None:
    def train(seed: int, out: dict[int, list[Tensor]]) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = nn.Parameter(torch.randn(30, 30, generator=generator))
        optimizer = torch.optim.SGD([weight], lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            weight.pow(2).mean().backward()
            optimizer.step()
        out[seed] = [weight.detach().clone()]

    def run() -> dict[int, list[Tensor]]:
        out: dict[int, list[Tensor]] = {}
        threads = [threading.Thread(target=train, args=(seed, out), name=f"worker-{seed}") for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out

    plain, watched, journal = plain_and_recorded(tmp_path, run)
    assert all(torch.equal(plain[seed][0], watched[seed][0]) for seed in range(3))
    assert journal.end is not None
    assert sorted(journal.end.steps.values()) == [60, 60, 60]
    assert {record.thread for record in journal.optimizers.values()} == {"worker-0", "worker-1", "worker-2"}
    for o in journal.optimizers:
        assert sum(b.microbatches for b in journal.blocks if b.o == o) == 60


def test_a_dead_optimizer_and_its_parameters_are_let_go(tmp_path: Path) -> None:
    import gc
    import weakref

    with recorded(tmp_path) as flight:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        references = [weakref.ref(p) for p in model.parameters()]
        grads = [weakref.ref(p.grad) for p in model.parameters()]  # type: ignore[arg-type]
        del model, optimizer
        gc.collect()
        assert not any(reference() is not None for reference in references + grads)
        assert not flight.recorder.states
    assert flight.journal.end is not None
    assert dict(flight.journal.end.steps) == {0: 6}
    assert sum(block.c for block in flight.journal.blocks) == 6


def attack(batch: Tensor) -> None:
    delta = torch.zeros_like(batch, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        (batch + delta).pow(2).sum().backward()
        optimizer.step()


def test_an_optimizer_for_each_batch_does_not_fill_the_journal(tmp_path: Path) -> None:
    with recorded(tmp_path, budget=0.01) as flight:
        for _ in range(600):
            attack(torch.ones(2, 8))
    journal = flight.journal
    assert len(journal.optimizers) == 32
    assert journal.end is not None
    assert journal.end.faults == 0
    assert sum(journal.end.steps.values()) == 2400
    assert sum(block.c for block in journal.blocks) == 2400
    (event,) = journal.named("not_seen")
    assert event.data["what"] == "Adam optimizers one by one"
    assert not journal.named("none")
    assert flight.path.stat().st_size < 200_000


def test_as_many_optimizers_as_tensors_that_live_together_have_a_record_each(tmp_path: Path) -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(50)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    with recorded(tmp_path) as flight:
        for _ in range(2):
            sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
            for optimizer in optimizers:
                optimizer.step()
    assert len(flight.journal.optimizers) == 50
    assert not flight.journal.named("not_seen")
