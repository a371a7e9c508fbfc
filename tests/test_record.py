"""The recorder against plain torch: what it says is what happened, and what happened is what would have happened."""

from __future__ import annotations

import itertools
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flights import close, plain_and_recorded, recorded
from gradctl._errors import NonFiniteGradient
from gradctl._journal import Journal


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 20, generator=generator), torch.randint(0, 3, (16,), generator=generator))
        for _ in range(count)
    ]


def train_mlp(steps: int = 12, accumulate: int = 1, clip: float | None = None) -> tuple[list[float], list[Tensor]]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for number, (x, y) in enumerate(batches(steps * accumulate), 1):
        loss = nn.functional.cross_entropy(model(x), y) / accumulate
        loss.backward()
        losses.append(loss.item())
        if number % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses, [p.detach().clone() for p in model.parameters()]


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


def measured_by_hand(model: nn.Module, steps: int, lr: float = 0.05) -> tuple[list[Any], list[Any], list[float]]:
    """Norms, update ratios and cosines of full tensors, by plain torch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    norms: list[Any] = []
    ratios: list[Any] = []
    cosines: list[float] = []
    last: Tensor | None = None
    for x, y in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        grads = [p.grad.detach().double().clone() for p in model.parameters() if p.grad is not None]
        before = [p.detach().double().clone() for p in model.parameters()]
        optimizer.step()
        norms.append([float(g.norm()) for g in grads])
        ratios.append(
            [
                float((p.detach().double() - b).norm() / b.norm())
                for p, b in zip(model.parameters(), before, strict=True)
            ]
        )
        flat = torch.cat([g.flatten() for g in grads])
        cosines.append(float(nn.functional.cosine_similarity(flat, last, dim=0)) if last is not None else math.nan)
        last = flat
    return norms, ratios, cosines


def test_rows_agree_with_full_tensors(tmp_path: Path) -> None:
    (norms, ratios, cosines), _, journal = plain_and_recorded(tmp_path, lambda: measured_by_hand(mlp(), 30))
    assert [row.n for row in journal.rows[:5]] == [1, 2, 3, 4, 5]
    for row in journal.rows:
        exact = norms[row.n - 1]
        assert all(close(code, value) for code, value in zip(row.g, exact, strict=True))
        assert row.tot == pytest.approx(math.hypot(*exact), rel=1e-3)
        # Every tensor has fewer elements than a sketch: nothing is sampled.
        assert all(close(code, value) for code, value in zip(row.u, ratios[row.n - 1], strict=True))
        if row.cos is not None:
            assert row.cos == pytest.approx(cosines[row.n - 1], abs=1e-3)
    assert sum(row.cos is not None for row in journal.rows) >= 5


def test_maxima_are_the_largest_norms_of_their_stretch(tmp_path: Path) -> None:
    (norms, _, _), _, journal = plain_and_recorded(tmp_path, lambda: measured_by_hand(mlp(), 60))
    assert sum(stretch.c for stretch in journal.maxima) == 60
    for stretch in journal.maxima:
        steps = norms[stretch.n - 1 : stretch.last]
        assert all(close(code, max(column)) for code, column in zip(stretch.g, zip(*steps, strict=True), strict=True))


def test_a_sketch_of_a_large_tensor_is_near_the_full_figures(tmp_path: Path) -> None:
    def train() -> Any:
        model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3))
        return measured_by_hand(model, 12)

    (_, ratios, cosines), _, journal = plain_and_recorded(tmp_path, train)
    for row in journal.rows:
        for code, value in zip(row.u, ratios[row.n - 1], strict=True):
            assert code == pytest.approx(value, rel=0.15)
        if row.cos is not None:
            assert row.cos == pytest.approx(cosines[row.n - 1], abs=0.1)


def test_clipping_is_counted_with_the_norm_before_it(tmp_path: Path) -> None:
    befores: list[float] = []

    def train() -> None:
        befores.clear()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            befores.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.9)))
            optimizer.step()

    _, _, journal = plain_and_recorded(tmp_path, train)
    clips = [block.clip for block in journal.blocks if block.clip is not None]
    assert sum(clip.calls for clip in clips) == 10
    assert sum(clip.clipped for clip in clips) == sum(norm > 0.9 for norm in befores)
    assert {clip.limit for clip in clips} == {0.9}
    assert max(clip.max_norm for clip in clips) == pytest.approx(max(befores), rel=1e-3)
    assert max(clip.worst_ratio for clip in clips) == pytest.approx(max(befores) / 0.9, rel=1e-3)


def test_accumulation_is_reported_as_observed(tmp_path: Path) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: train_mlp(6, accumulate=4))
    (event,) = journal.named("accumulation")
    assert event.data["microbatches"] == 4
    assert event.n == 1
    assert sum(block.microbatches for block in journal.blocks) == 24


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


def poisoned(at: int, steps: int = 12, value: float = math.nan) -> list[Tensor]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (x, y) in enumerate(batches(steps), 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if number == at:
            model[2].weight.grad[1, 5] = value  # type: ignore[index, union-attr]
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_every_precision_are_taken_without_overflow(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(100, 100, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with recorded(tmp_path) as flight:
        for _ in range(7):
            weight.grad = torch.full_like(weight, 1000.0)
            optimizer.step()
    assert not flight.journal.named("nonfinite")
    assert all(close(row.g[0], 1e5) for row in flight.journal.rows)


def test_gradients_whose_squares_overflow_are_not_called_bad(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with recorded(tmp_path) as flight:
        for _ in range(4):
            weight.grad = torch.full_like(weight, 1e25)
            optimizer.step()
    assert not flight.journal.named("nonfinite")
    assert all(close(row.g[0], 1e25 * math.sqrt(10)) for row in flight.journal.rows)


def test_gradients_whose_squares_vanish_are_not_called_zero(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with recorded(tmp_path) as flight:
        for number in range(4):
            weight.grad = torch.full_like(weight, 1e-30 if number else 0.0)
            optimizer.step()
    assert [row.zero for row in flight.journal.rows] == [1, 0, 0, 0]
    assert close(flight.journal.rows[1].g[0], 1e-30 * math.sqrt(10))


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


def test_sparse_gradients_are_read_by_their_values(tmp_path: Path) -> None:
    table = nn.Embedding(50, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    exact: list[float] = []
    with recorded(tmp_path) as flight:
        for number in range(5):
            optimizer.zero_grad()
            table(torch.arange(number, number + 6)).pow(2).sum().backward()
            assert table.weight.grad is not None
            exact.append(float(table.weight.grad.to_dense().norm()))
            optimizer.step()
    assert all(close(row.g[0], value) for row, value in zip(flight.journal.rows, exact, strict=True))
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0


def test_complex_channels_last_empty_and_scalar_tensors_are_read(tmp_path: Path) -> None:
    params = [
        nn.Parameter(torch.randn(4, 4, dtype=torch.complex64)),
        nn.Parameter(torch.randn(70, 4, 3, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(60, 50).t()),
    ]
    optimizer = torch.optim.SGD(params, lr=0.1)
    exact: list[list[float]] = []
    ratios: list[list[float]] = []
    with recorded(tmp_path) as flight:
        for _ in range(6):
            for param in params:
                param.grad = torch.randn(param.shape, dtype=param.dtype)  # contiguous, whatever the parameter is
            before = [p.detach().clone() for p in params]
            exact.append([float(p.grad.abs().double().norm()) for p in params if p.grad is not None])
            optimizer.step()
            ratios.append([float((p.detach() - b).norm() / b.norm()) for p, b in zip(params, before, strict=True)])
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0
    for row, norms, ratio in zip(flight.journal.rows, exact, ratios, strict=False):
        assert [index for index, code in enumerate(row.g) if code is None] == [2]
        for index in (0, 1, 3, 4):
            assert close(row.g[index], norms[index])
            assert row.u[index] == pytest.approx(ratio[index], rel=0.2)
        if row.n > 1:
            assert row.cos is not None
            assert abs(row.cos) < 0.2


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


def test_saved_bytes_are_those_that_hooks_count(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(16, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = {p.data_ptr() for p in model.parameters()}
    counted: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            counted[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = nn.functional.cross_entropy(model(x), torch.zeros(16, dtype=torch.long))
    del kept
    with recorded(tmp_path) as flight:
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.zeros(16, dtype=torch.long)).backward()
            optimizer.step()
    (saved,) = flight.journal.saved
    assert (saved.n, saved.method) == (3, "walk")
    assert saved.total == pytest.approx(sum(counted.values()), rel=0.001)


def test_saved_bytes_by_line_name_this_file(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(16, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path, lines=True) as flight:
        for _ in range(6):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    (saved,) = flight.journal.saved
    assert saved.method == "hooks"
    assert any("test_record.py" in row.where for row in saved.rows)


def test_torch_func_goes_on_working_while_lines_are_watched(tmp_path: Path) -> None:
    def train() -> list[float]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses: list[float] = []
        for x, _ in batches(6):
            optimizer.zero_grad()
            loss = model(torch.func.grad(lambda v: v.pow(2).sum())(x)).pow(2).mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        return losses

    plain, watched, _ = plain_and_recorded(tmp_path, train, lines=True)
    assert watched == plain


def test_only_so_many_steps_are_recorded_when_asked(tmp_path: Path) -> None:
    _, _, journal = plain_and_recorded(tmp_path, lambda: train_mlp(20), watch_steps=6)
    assert journal.end is not None
    assert dict(journal.end.steps) == {0: 6}
    assert any("step 6" in what for what, _ in journal.end.not_seen)


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


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    with recorded(tmp_path) as flight:
        model = mlp()
        torch.optim.SGD(model.parameters(), lr=0.1)
        assert not flight.path.exists()


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


def losses_of(journal: Journal) -> list[float]:
    return [block.loss[0] for block in journal.blocks if block.loss]


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


def test_autocast_does_not_round_what_is_measured(tmp_path: Path) -> None:
    def train() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return measured_by_hand(mlp(), 8)

    (norms, ratios, _), _, journal = plain_and_recorded(tmp_path, train)
    for row in journal.rows:
        assert all(close(code, value) for code, value in zip(row.g, norms[row.n - 1], strict=True))
        assert all(close(code, value) for code, value in zip(row.u, ratios[row.n - 1], strict=True))


def test_grad_mode_and_the_generators_are_as_they_were(tmp_path: Path) -> None:
    def train() -> tuple[bool, bool, Tensor]:
        train_mlp(9)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_rng_state()

    plain, watched, _ = plain_and_recorded(tmp_path, train)
    assert plain[:2] == watched[:2]
    assert torch.equal(plain[2], watched[2])


def test_norms_and_rows_that_wait_on_a_device_say_the_same_at_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (norms, _, _), _, near = plain_and_recorded(tmp_path, lambda: measured_by_hand(mlp(), 20))
    monkeypatch.setattr("gradctl._record._quiet.is_here", lambda tensor: False)
    _, _, far = plain_and_recorded(tmp_path, lambda: measured_by_hand(mlp(), 20))
    assert far.end is not None
    assert far.end.faults == 0
    assert sum(stretch.c for stretch in far.maxima) == 20
    totals = [block.norm[1] for block in far.blocks if block.norm is not None]
    assert max(totals) == pytest.approx(max(math.hypot(*step) for step in norms), rel=1e-3)
    by_step = {row.n: row for row in near.rows}
    for row in far.rows:
        if row.n in by_step:
            assert (row.g, row.u, row.cos) == (by_step[row.n].g, by_step[row.n].u, by_step[row.n].cos)


def test_a_bad_gradient_on_a_device_is_named_with_its_step_at_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradctl._record._quiet.is_here", lambda tensor: False)
    _, _, journal = plain_and_recorded(tmp_path, lambda: poisoned(21, steps=40))
    first = journal.named("nonfinite")[0]
    grads = [event for event in journal.named("nonfinite") if event.data["what"] == "grad"]
    assert first.data["what"] in ("grad", "loss")
    assert (grads[0].n, grads[0].data["params"]) == (21, ["2.weight"])


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


@pytest.mark.parametrize("until", [4, 99])
def test_lines_beside_torch_func_are_found_later_or_walked(tmp_path: Path, until: int) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path, lines=True) as flight:
        for number, (x, _) in enumerate(batches(12), 1):
            optimizer.zero_grad()
            if number <= until:
                x = torch.func.grad(lambda v: v.pow(2).sum())(x)
            model(x).pow(2).mean().backward()
            optimizer.step()
    (saved,) = flight.journal.saved
    assert saved.method == ("hooks" if until == 4 else "walk")
    assert saved.total > 0
    assert saved.count > 0
    assert [event.data["what"] for event in flight.journal.named("not_seen")] == (
        [] if until == 4 else ["saved bytes by line"]
    )


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
