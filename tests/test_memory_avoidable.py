"""`gradctl.memory`: what of the saved bytes backward could do without; each claim is tried on the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradctl

pytestmark = pytest.mark.usefixtures("no_optimizers_of_other_tests")


def of_kind(report: Any, kind: str) -> list[Any]:
    return [one for one in report.avoidable if one.kind == kind]


def test_inputs_of_frozen_convolutions_are_dead() -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1)
    frozen = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 3, padding=1)).requires_grad_(False)
    model = nn.Sequential(stem, frozen)
    x = torch.randn(4, 3, 16, 16)
    report = gradctl.memory(lambda: model(x).sum().backward(), model)
    dead = of_kind(report, "dead")
    hidden = 4 * 8 * 16 * 16 * 4
    assert {one.module for one in dead} == {"1.0", "1.1"}
    assert [one.nbytes for one in dead] == [hidden, hidden]
    assert report.dead_bytes == 2 * hidden
    assert "the weight is frozen" in dead[0].why


def test_the_dead_inputs_may_be_overwritten_without_changing_a_gradient() -> None:
    """The claim itself: zeros in place of what is called dead give the same gradients."""
    torch.manual_seed(0)
    stem, frozen = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    x = torch.randn(4, 3, 16, 16)

    def gradient(*, blank: bool) -> Tensor:
        hidden = stem(x)
        inputs = {hidden.data_ptr()} if blank else set[int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: torch.zeros_like(t) if t.data_ptr() in inputs else t, lambda t: t
        ):
            out = frozen(hidden)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), stem.weight)
        return grad

    assert torch.equal(gradient(blank=True), gradient(blank=False))


def test_a_frozen_norm_with_fixed_statistics_keeps_a_dead_input_and_one_that_trains_does_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    for fixed in (True, False):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).requires_grad_(False))
        model[1].train(not fixed)
        report = gradctl.memory(lambda model=model: model(x).pow(2).sum().backward(), model)
        dead = of_kind(report, "dead")
        assert [one.module for one in dead] == (["1"] if fixed else [])


def test_weights_that_train_leave_nothing_dead() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 16, 16)
    report = gradctl.memory(lambda: model(x).sum().backward(), model)
    assert report.avoidable == ()


def test_casts_of_one_activation_are_duplicates() -> None:
    torch.manual_seed(0)
    query, key = nn.Linear(64, 64), nn.Linear(64, 64)
    x = torch.randn(256, 64, requires_grad=True)
    model = nn.ModuleList([query, key])

    def step() -> None:
        hidden = x.tanh()
        with torch.autocast("cpu", torch.bfloat16):
            (query(hidden) * key(hidden)).float().pow(2).sum().backward()

    report = gradctl.memory(step, model)
    duplicates = of_kind(report, "duplicate")
    assert [one.nbytes for one in duplicates] == [256 * 64 * 2]
    assert report.duplicate_bytes == 256 * 64 * 2


def test_different_numbers_of_one_shape_are_no_duplicates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    x = torch.randn(256, 64)
    report = gradctl.memory(lambda: model(x).sum().backward(), model)
    assert of_kind(report, "duplicate") == []


def test_a_weight_that_is_cast_for_each_microbatch_is_copied_again() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    pieces = [torch.randn(16, 64, requires_grad=True) for _ in range(3)]

    def step() -> None:
        losses: list[Tensor] = []
        for piece in pieces:
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(model(piece).float().pow(2).sum())
        torch.stack(losses).sum().backward()

    report = gradctl.memory(step, model)
    copies = of_kind(report, "weight copy")
    assert sum(one.nbytes for one in copies) == 2 * 64 * 32 * 2, "the first copy is needed"
    assert "weight was copied and saved before" in copies[0].why


def test_weights_that_are_saved_cost_nothing_and_are_counted_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    x = torch.randn(8, 64, requires_grad=True)
    report = gradctl.memory(lambda: model(x).sum().backward(), model)
    assert report.saved_bytes == 8 * 32 * 4, "the hidden layer"
    assert report.weights_saved == 3, "two weights and the input"
    assert report.copied_bytes == 8 * 32 * 4 + 64 * 32 * 4 + 32 * 16 * 4 + 8 * 64 * 4


def test_what_is_recomputed_is_not_saved() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(512, 64, requires_grad=True)
    plain = gradctl.memory(lambda: model(x).sum().backward(), model)
    again = gradctl.memory(lambda: checkpoint(model, x, use_reentrant=False).sum().backward(), model)
    assert plain.saved_bytes == 2 * 512 * 256 * 4
    assert again.saved_bytes == 0, "its input alone, which was there before"
    assert again.peak_bytes >= plain.peak_bytes - 512 * 256 * 4, "in backward all of it is there for a while"


def test_a_tied_weight_is_one_weight() -> None:
    torch.manual_seed(0)
    embed, head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    tokens = torch.randint(0, 50, (4, 8))
    flat = tokens.view(-1)
    report = gradctl.memory(lambda: functional.cross_entropy(model(tokens).view(-1, 50), flat).backward(), model)
    assert report.by_category()["weights"] == 50 * 16 * 4


def test_two_models_in_one_step_are_told_apart() -> None:
    class Generator(nn.Linear): ...

    class Critic(nn.Linear): ...

    torch.manual_seed(0)
    generator, critic = Generator(8, 64), Critic(64, 1)
    noise = torch.randn(256, 8)
    report = gradctl.memory(lambda: critic(generator(noise).tanh()).sum().backward())
    assert {row.module for row in report.alive if row.category == "weights"} == {
        "weight", "bias", "Critic.weight", "Critic.bias",
    }  # fmt: skip


def test_what_a_list_of_the_program_holds_is_named_by_its_line() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    x = torch.randn(4096, 64)
    held: list[Tensor] = []

    def step() -> None:
        with torch.no_grad():
            held.append(model(x))  # held
        model(x[:1]).sum().backward()

    report = gradctl.memory(step, model)
    held.clear()
    rows = [row for row in report.alive if row.category == "temporary" and row.nbytes == 4096 * 64 * 4]
    assert len(rows) == 1
    assert "test_memory_avoidable.py" in rows[0].line
