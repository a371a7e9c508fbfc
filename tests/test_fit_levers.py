"""Levers of a plan beside keeping and making again: the same bits in fewer bytes, or left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradctl._fit import Plan, fit
from gradctl._fit._allocator import Allocated
from gradctl._fit._levers_head import HeadInPlace

ROWS, CLASSES = 512, 1000
LOGITS = ROWS * CLASSES * 4
Loss = Callable[[Tensor, Tensor, list[Any]], Tensor]


def observed(attach: Callable[[Tensor, list[Any]], Any]) -> Loss:
    def loss(logits: Tensor, target: Tensor, seen: list[Any]) -> Tensor:
        logs = logits.log_softmax(1)
        attach(logs, seen)
        return F.nll_loss(logs, target)

    return loss


def used_twice(logits: Tensor, target: Tensor, seen: list[Any]) -> Tensor:
    logs = logits.log_softmax(1)
    return F.nll_loss(logs, target) + logs.pow(2).mean() + logs.exp().sum()


def retained(logs: Tensor, seen: list[Any]) -> None:
    logs.retain_grad()
    seen.append(logs)


def held_by_a_leaf(logits: Tensor, target: Tensor, seen: list[Any]) -> Tensor:
    bias = torch.zeros_like(logits, requires_grad=True)
    seen.append(bias)
    return F.nll_loss(bias + logits.log_softmax(1), target)


PLAIN: dict[str, Loss] = {
    "mean": lambda logits, target, _: F.cross_entropy(logits, target),
    "sum": lambda logits, target, _: F.cross_entropy(logits, target, reduction="sum"),
    "smoothed": lambda logits, target, _: F.cross_entropy(logits, target, label_smoothing=0.1),
    "some ignored": lambda logits, target, _: F.cross_entropy(logits, target.where(target > 99, -100)),
    "weighted": lambda logits, target, _: F.cross_entropy(logits, target, weight=torch.arange(1.0, CLASSES + 1)),
    "bfloat16": lambda logits, target, _: F.cross_entropy(logits.bfloat16(), target),
    "used twice": used_twice,
    "passed on to a leaf, which takes a copy": held_by_a_leaf,
}
HELD: dict[str, Loss] = {
    "a hook keeps it": observed(lambda logs, seen: logs.register_hook(lambda grad: seen.append(grad))),
    "a hook of the node keeps it": observed(
        lambda logs, seen: logs.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))
    ),
}


def backward(loss: Loss, *, head: bool) -> tuple[list[Tensor], list[int]]:
    torch.manual_seed(0)
    x, target = torch.randn(ROWS, CLASSES, requires_grad=True), torch.randint(0, CLASSES, (ROWS,))
    seen: list[Any] = []
    tape = HeadInPlace(outer=None)
    if head:
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, tape.unpack):
            found = loss(x * 1, target, seen)
    else:
        found = loss(x * 1, target, seen)
    found.backward()
    assert x.grad is not None
    return [x.grad, *(t.grad if t.grad is not None else t for t in seen)], tape.spared


@pytest.mark.parametrize("loss", PLAIN.values(), ids=PLAIN)
def test_the_gradient_of_a_cross_entropy_is_written_in_place_with_the_same_bits(loss: Loss) -> None:
    plain, _ = backward(loss, head=False)
    ours, spared = backward(loss, head=True)
    assert all(map(torch.equal, plain, ours))
    assert len(spared) == 1


@pytest.mark.parametrize("loss", HELD.values(), ids=HELD)
def test_a_gradient_that_somebody_holds_is_not_written_over(loss: Loss) -> None:
    plain, _ = backward(loss, head=False)
    ours, spared = backward(loss, head=True)
    assert len(plain) == 2
    assert all(map(torch.equal, plain, ours))
    assert spared == []


def test_a_gradient_that_was_asked_for_is_not_written_over() -> None:
    found = []
    for head in (False, True):
        torch.manual_seed(0)
        x, target = torch.randn(ROWS, CLASSES, requires_grad=True), torch.randint(0, CLASSES, (ROWS,))
        tape = HeadInPlace(outer=None)
        with torch.autograd.graph.saved_tensors_hooks(*((tape.pack, tape.unpack) if head else (_same, _same))):
            logs = (x * 1).log_softmax(1)
            loss = F.nll_loss(logs, target)
        found.append(torch.autograd.grad(loss, [logs, x]))
    assert all(map(torch.equal, *found))


def _same(tensor: Tensor) -> Tensor:
    return tensor.detach()


def test_second_derivatives_and_kept_graphs_are_those_of_the_plain_loss() -> None:
    found = []
    for head in (False, True):
        torch.manual_seed(0)
        x, target = torch.randn(ROWS, CLASSES, requires_grad=True), torch.randint(0, CLASSES, (ROWS,))
        tape = HeadInPlace(outer=None)
        with torch.autograd.graph.saved_tensors_hooks(*((tape.pack, tape.unpack) if head else (_same, _same))):
            loss = F.cross_entropy(x * 1, target)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        slope.pow(2).sum().backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_classes_in_the_middle_of_a_tensor_are_written_in_place_too() -> None:
    found = []
    for head in (False, True):
        torch.manual_seed(0)
        x, target = torch.randn(4, 30, 40, 40, requires_grad=True), torch.randint(0, 30, (4, 40, 40))
        tape = HeadInPlace(outer=None)
        with torch.autograd.graph.saved_tensors_hooks(*((tape.pack, tape.unpack) if head else (_same, _same))):
            loss = F.cross_entropy(x * 1, target)
        loss.backward()
        found.append(x.grad)
    assert torch.equal(*found)
    assert len(tape.spared) == 1


def test_the_peak_of_backward_is_lower_by_one_tensor_of_logits() -> None:
    peaks = []
    for head in (False, True):
        with Allocated() as seen:
            backward(PLAIN["mean"], head=head)
        level = peak = 0
        for change in seen.changes:
            level += change.nbytes
            peak = max(peak, level)
        peaks.append(peak)
    assert abs(peaks[0] - peaks[1] - LOGITS) < 20_000


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, CLASSES, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(x)), target)


def test_a_plan_counts_the_bytes_of_the_head_and_leaves_it_out_when_asked_to() -> None:
    torch.manual_seed(0)
    model = Classifier()
    x, target = torch.randn(ROWS, 16), torch.randint(0, CLASSES, (ROWS,))

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(x, target)
        loss.backward()
        return loss

    step()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    buffers = [b.clone() for b in model.buffers()]
    for buffer, before in zip(model.buffers(), (torch.zeros(32), torch.ones(32), torch.tensor(0)), strict=True):
        buffer.copy_(before)
    easy = fit(model, step, memory="1GiB")
    assert easy.drops_nothing
    easy.undo()

    budget = easy.plain_peak - LOGITS // 2
    plan = fit(model, step, memory=budget)
    assert plan.levers == ("head",)
    assert "written in place" in str(plan)
    assert not any(call.drop or call.pack for call in plan.calls)
    assert plan.measured_peak is not None
    assert plan.measured_peak <= budget
    assert abs(plan.predicted_peak - plan.measured_peak) < 0.02 * plan.measured_peak
    assert Plan.from_json(plan.to_json()) == plan
    step()
    assert all(map(torch.equal, plain, [p.grad for p in model.parameters() if p.grad is not None]))
    assert all(map(torch.equal, buffers, model.buffers()))
    plan.undo()

    without = fit(model, step, memory="1GiB", levers=("pack", "replay"))
    assert without.levers == ()
    assert abs(without.plain_peak - easy.plain_peak) < 0.01 * easy.plain_peak
