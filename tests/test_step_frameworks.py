"""`gradctl.Step` inside of Lightning and accelerate, beside the recorder, and what a `transformers.Trainer` is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradctl
from gradctl._journal import JournalWriter
from gradctl._record import Recorder


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    return [(torch.randn(4, 6), torch.randint(0, 4, (4,))) for _ in range(count)]


def loss_of(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_hand(data: list[tuple[Tensor, Tensor]], accumulate: int) -> list[Tensor]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for start in range(0, len(data), accumulate):
        parts = data[start : start + accumulate]
        x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return [p.detach() for p in model.parameters()]


def close(model: nn.Module, expected: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-6)


# -- the recorder -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_optimizers_of_other_tests")
def test_a_recording_hears_clips_and_skips_and_changes_no_bit(tmp_path: Path) -> None:
    data = batches(7)
    data[3] = (data[3][0] * torch.inf, data[3][1])
    found: list[list[Tensor]] = []
    for recorded in (False, True):
        model = network()
        step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2, clip=0.1)
        writer = JournalWriter(tmp_path / f"{recorded}.jsonl")
        recorder = Recorder(writer)
        if recorded:
            recorder.install()
        results = list(step.epoch(data, lambda batch, m=model: loss_of(m, batch)))
        recorder.finish("stopped")
        writer.close()
        assert [result.skipped for result in results] == [False, True, False, False]
        found.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *found))
    text = (tmp_path / "True.jsonl").read_text()
    assert '"clip":[1,1,' in text
    assert text.count('"e":"skip"') == 1
    assert '"faults":0' in text


# -- accelerate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator_class() -> Any:
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield accelerate.Accelerator
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_step_works_with_what_accelerate_has_prepared(accelerator_class: Any) -> None:
    data = batches(6)
    accelerator = accelerator_class(cpu=True)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    step = gradctl.Step(model, optimizer, accumulate=3, scheduler=scheduler)
    list(step.epoch(data, lambda batch: loss_of(model, batch)))
    close(model, by_hand(data, 3))
    assert scheduler.scheduler.last_epoch == 2


def test_an_accelerator_that_accumulates_itself_is_refused(accelerator_class: Any) -> None:
    accelerator = accelerator_class(cpu=True, gradient_accumulation_steps=4)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(gradctl.UsageError, match=r"^the Accelerator accumulates 4 microbatches"):
        gradctl.Step(model, optimizer, accumulate=4)


def test_an_accelerator_that_scales_the_loss_is_refused(accelerator_class: Any) -> None:
    accelerator = accelerator_class(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(gradctl.UsageError, match=r"^the Accelerator scales the loss \(mixed_precision='fp16'\)"):
        gradctl.Step(model, optimizer)


# -- Lightning --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning() -> Any:
    """Imported before anything is held against leaks: the import sets a variable and patches torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch

        return lightning.pytorch


def lightning_module(lightning: Any, manual: bool, accumulate: int) -> Any:

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.net = network()
            self.results: list[Any] = []

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

        def on_train_start(self) -> None:
            self.step = gradctl.Step(
                self, self.optimizers(), accumulate=accumulate, scheduler=self.lr_schedulers(), clip=100.0
            )

        def training_step(self, batch: Any, index: int) -> None:
            with self.step.forward():
                loss = loss_of(self.net, batch)
            self.step.backward(loss)
            if self.step.ready or self.trainer.is_last_batch:  # later, Lightning would not count the step
                self.results.append(self.step.flush())

    return Module()


def fit(lightning: Any, module: Any, data: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning's own: few workers, no logger
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)
    return trainer


@pytest.mark.slow
def test_step_works_in_lightnings_manual_optimization_which_counts_its_steps(lightning: Any) -> None:
    data = batches(7)
    module = lightning_module(lightning, manual=True, accumulate=3)
    trainer = fit(lightning, module, torch.utils.data.DataLoader(data, batch_size=None))
    close(module.net, by_hand(data, 3))
    assert trainer.global_step == 3
    assert [result.microbatches for result in module.results] == [3, 3, 1]


@pytest.mark.slow
def test_lightnings_automatic_optimization_is_refused(lightning: Any) -> None:
    module = lightning_module(lightning, manual=False, accumulate=1)
    with pytest.raises(gradctl.UsageError, match=r"^Module lets Lightning optimize"):
        fit(lightning, module, torch.utils.data.DataLoader(batches(1), batch_size=None))


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trainer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    import transformers

    model = network()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=model, args=arguments)
    with pytest.raises(gradctl.UsageError, match=r"(?s)^Step\(Trainer\).*it calls nothing in between") as error:
        gradctl.Step(trainer, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "Step(trainer.model, ...)" in str(error.value)


@pytest.mark.slow
def test_a_transformers_model_trains_through_step_by_its_own_loss() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    ids, labels = torch.randint(0, 30, (7, 5)), torch.randint(0, 3, (7,))
    exact = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, model.classifier.weight)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.classifier.weight.detach().clone()
    step = gradctl.Step(model, optimizer, accumulate=3)
    parts = [{"input_ids": i, "labels": y} for i, y in zip(ids.split(3), labels.split(3), strict=True)]
    assert step(parts, lambda part: model(**part).loss).items == 7
    torch.testing.assert_close(before - model.classifier.weight.detach(), exact, rtol=1e-4, atol=1e-7)


# -- several processes ------------------------------------------------------------------------------------------------


def test_a_model_that_averages_over_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class DistributedDataParallel(nn.Sequential):
        pass

    monkeypatch.setattr("gradctl._step._frameworks._world_size", lambda: 2)
    model = DistributedDataParallel(nn.Linear(2, 2))
    with pytest.raises(gradctl.UsageError, match=r"^Step\(DistributedDataParallel\) in 2 processes"):
        gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1))
