"""`gradctl.memory`: its bytes are those of the allocator and of autograd, and everything is as it was afterwards."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import gradctl
from gradctl import MemoryReport, UsageError, _taps

pytestmark = pytest.mark.usefixtures("no_optimizers_of_other_tests")

Step = Callable[[], Any]


def peak_by_kineto(step: Step) -> int:
    """The allocator's peak above the start of a step that frees nothing from before, as the other profiler has it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    events = [
        (event.start_ns(), event.nbytes())
        for event in seen.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    total = peak = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        total += nbytes
        peak = max(peak, total)
    return peak


def saved_by_hooks(forward: Step, there: list[Tensor]) -> int:
    """Bytes of the distinct storages that autograd packs, without those of `there`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor.detach())  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 256)
        self.norm = nn.LayerNorm(256)
        self.drop = nn.Dropout(0.1)
        self.last = nn.Linear(256, 500)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.first(x))
        return self.last(self.drop(self.norm(hidden)))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(32, 48)
        self.out = nn.Linear(48, 500)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for piece in x.view(x.shape[0], -1, 32).unbind(1):
            state = self.cell(piece, state)
        assert state is not None
        return self.out(state[0])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3)
        )
        self.out = nn.Linear(32, 500)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x.view(x.shape[0], 1, 8, 8)).mean((2, 3)))


MODELS = {"perceptron": (Perceptron, 0.001), "cells": (Cells, 0.001), "convolutions": (Convolutions, 0.02)}


def made(kind: Callable[[], nn.Module], batch: int = 128) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return kind(), torch.randn(batch, 64), torch.randint(0, 500, (batch,))


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_the_one_that_another_profiler_finds(name: str) -> None:
    kind, tolerance = MODELS[name]
    model, x, y = made(kind)

    def step() -> None:
        functional.cross_entropy(model(x), y).backward()

    report = gradctl.memory(step, model)
    standing = bytes_of([*model.parameters(), *model.buffers(), x, y])
    truth = standing + peak_by_kineto(step)
    assert report.start_bytes == standing
    assert abs(report.peak_bytes - truth) <= tolerance * truth
    assert report.device == "cpu"
    assert report.peaks == {"cpu": report.peak_bytes}


@pytest.mark.parametrize("name", MODELS)
def test_saved_bytes_are_those_that_saved_tensor_hooks_see(name: str) -> None:
    model, x, y = made(MODELS[name][0])
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    truth = saved_by_hooks(lambda: functional.cross_entropy(model(x), y), [*model.parameters(), *model.buffers(), x, y])
    assert report.saved_bytes == truth
    assert sum(row.nbytes for row in report.saved_by_module) == truth
    assert sum(row.nbytes for row in report.saved_by_line) == truth


def test_a_step_that_is_measured_again_has_the_same_bytes() -> None:
    model, x, y = made(Perceptron)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    first = gradctl.memory(step, model)
    for again in (gradctl.memory(step, model), gradctl.memory(step), gradctl.memory(step)):
        assert again.peak_bytes == first.peak_bytes
        assert again.at_peak == first.at_peak
        assert again.start_bytes == first.start_bytes


def test_categories_at_the_peak_are_what_can_be_counted_by_hand() -> None:
    model, x, y = made(Perceptron, batch=1024)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    found = gradctl.memory(step, model).by_category()
    assert found["weights"] == bytes_of(model.parameters())
    assert found["optimizer state"] == bytes_of(v for state in optimizer.state.values() for v in state.values())
    assert found["inputs"] == bytes_of([x, y])
    assert found["gradients"] == 0, "the peak is where the loss begins to go back, and none has come yet"


def test_gradients_that_a_step_keeps_are_counted_at_its_peak() -> None:
    model, x, y = made(Perceptron)
    functional.cross_entropy(model(x), y).backward()
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    assert report.by_category()["gradients"] == bytes_of(p.grad for p in model.parameters())
    names = {row.module for row in report.alive if row.category == "gradients"}
    assert names == {name for name, _ in model.named_parameters()}


def test_what_is_alive_adds_up_to_the_peak() -> None:
    model, x, y = made(Convolutions)
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    assert sum(report.at_peak) == report.peak_bytes
    assert sum(row.nbytes for row in report.alive) == report.peak_bytes
    by_category = dict.fromkeys(report.by_category(), 0)
    for row in report.alive:
        by_category[row.category] += row.nbytes
    assert by_category == report.by_category()


def test_the_course_of_the_step_goes_through_its_peak_and_back() -> None:
    model, x, y = made(Perceptron)
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    assert max(moment.total for moment in report.moments) == report.peak_bytes
    assert report.moments[0].phase == "forward"
    assert {m.phase for m in report.moments} == {"forward", "backward"}
    assert report.moments[-1].total == report.start_bytes + bytes_of(model.parameters()), "gradients are left"
    assert [m.seconds for m in report.moments] == sorted(m.seconds for m in report.moments)


def test_modules_and_lines_are_those_that_saved(tmp_path: Any) -> None:
    model, x, y = made(Perceptron, batch=512)
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    by_module = {row.where: row.nbytes for row in report.saved_by_module}
    hidden = 512 * 256 * 4
    assert by_module["Perceptron"] == hidden, "what gelu saves"
    assert by_module["norm"] == hidden + 2 * 512 * 4, "its input, mean and deviation"
    assert by_module["drop"] == hidden, "its mask"
    assert by_module["last"] == hidden, "its input"
    line = next(row.where for row in report.saved_by_line if row.nbytes == hidden)
    assert line.endswith(" forward")
    assert "test_memory_figures.py:" in line


def test_the_part_of_the_loss_is_told() -> None:
    model, x, y = made(Perceptron, batch=512)
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    logits = 512 * 500 * 4
    assert logits <= report.head_saved_bytes <= logits + 8, "the log-probabilities, and the total weight"
    assert report.head_peak_bytes >= 3 * logits, "they, their gradient and that of the logits"
    assert report.peak_phase == "backward"
    assert "log_softmax_backward" in report.peak_operation


def test_model_optimizer_and_random_state_are_left_as_they_were() -> None:
    model, x, y = made(Convolutions)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = [t.clone() for t in (*model.state_dict().values(), *(p.grad for p in model.parameters()))]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    random = torch.get_rng_state()

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x + torch.randn(())), y).backward()
        optimizer.step()

    for given in (model, None):
        gradctl.memory(step, given)
        after = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        found = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(momenta, found, strict=True))
        assert torch.equal(random, torch.get_rng_state())


def test_gradients_under_the_meter_are_those_without_it() -> None:
    model, x, y = made(Perceptron)
    seen: list[Tensor] = []

    def step() -> None:
        torch.manual_seed(1)
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        seen.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)

    gradctl.memory(step, model)
    metered, seen[:] = list(seen), []
    step()
    assert all(torch.equal(a, b) for a, b in zip(metered, seen, strict=True))


def test_a_batch_that_is_made_in_the_step_and_given_by_keyword_is_an_input() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 500)

        def forward(self, *, batch: dict[str, Tensor]) -> Tensor:
            return self.inner(batch["x"])

    model = Named()
    report = gradctl.memory(lambda: model(batch={"x": torch.randn(128, 64)}).sum().backward(), model)
    assert report.by_category()["inputs"] == 128 * 64 * 4


def test_microbatches_count_what_is_alive_at_once() -> None:
    model, x, y = made(Perceptron)

    def step(pieces: int) -> None:
        for some, of in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            functional.cross_entropy(model(some), of).backward()

    whole = gradctl.memory(lambda: step(1), model)
    pieces = gradctl.memory(lambda: step(4), model)
    assert pieces.saved_bytes < whole.saved_bytes / 3.9
    assert pieces.peak_bytes < whole.peak_bytes


def test_a_report_goes_to_json_and_back() -> None:
    model, x, y = made(Perceptron)
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["schema"] == "gradctl.memory/1"
    assert MemoryReport.from_json(text) == report
    assert MemoryReport.from_json(json.loads(text)) == report


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "gradctl.plan/1"},
        {"peak_bytes": "12"},
        {"at_peak": [1, 2]},
        {"alive": [{"category": "gold", "module": "", "line": "", "nbytes": 1, "count": 1}]},
        {"moments": 3},
        {"remarks": None},
    ],
)
def test_json_that_is_no_report_is_refused(change: dict[str, Any]) -> None:
    model, x, y = made(Perceptron)
    data = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model).to_json()
    with pytest.raises(UsageError, match="this is no memory report"):
        MemoryReport.from_json({**data, **change})


def test_a_report_is_shown_as_text_and_in_a_notebook() -> None:
    model, x, y = made(Perceptron)
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    text = str(report)
    assert text.startswith("peak ")
    assert "saved for backward" in text
    assert "the loss after the last layer with weights" in text
    assert report._repr_html_().startswith("<pre>peak ")
    assert max(len(line) for line in text.splitlines()) <= 140


# ---------------------------------------------------------------------------------------------------- bad input


def test_a_step_that_raises_leaves_everything_as_it_was() -> None:
    model, x, y = made(Perceptron)
    before = [t.clone() for t in model.state_dict().values()]
    installed = _taps.installed()

    def step() -> None:
        with torch.no_grad():
            model.first.weight.add_(model(x).sum())
        raise KeyError("midway")

    with pytest.raises(KeyError, match="midway"):
        gradctl.memory(step, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert _taps.installed() == installed
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)  # and the profiler is free again


def test_a_step_that_does_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="the step did nothing with tensors") as error:
        gradctl.memory(lambda: None)
    assert "fix   pass a function that runs forward and backward" in str(error.value)


def test_a_step_without_backward_says_so() -> None:
    model, x, y = made(Perceptron)
    report = gradctl.memory(lambda: functional.cross_entropy(model(x), y), model)
    assert any("the step ran no backward" in remark for remark in report.remarks)
    assert report.saved_bytes > 0
    with torch.no_grad():
        assert gradctl.memory(lambda: model(x), model).saved_bytes == 0


def test_a_running_profiler_is_in_the_way() -> None:
    model, x, y = made(Perceptron)
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(UsageError, match="while a profiler is running"):
        gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_hooks_of_the_program_around_the_step_are_told_of() -> None:
    model, x, y = made(Perceptron)
    with torch.autograd.graph.save_on_cpu():
        report = gradctl.memory(lambda: functional.cross_entropy(model(x), y).backward(), model)
    assert any("saved-tensor hooks of the program" in remark for remark in report.remarks)


def test_the_allocator_says_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    model, x, y = made(Perceptron)
    functional.cross_entropy(model(x), y).backward()

    def step() -> None:
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()

    gradctl.memory(step, model)
    assert capfd.readouterr().err == ""
