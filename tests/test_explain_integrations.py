"""The callbacks for `transformers.Trainer` and Lightning: what they trace, report and stop, on small models."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl
from starting import environment

CUT = "hidden = hidden.detach()"


class Net(nn.Module):
    def __init__(self, *, cut: bool, fails: bool = False) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)
        self.cut = cut
        self.fails = fails

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.relu(self.tower(x))
        if self.cut:
            hidden = hidden.detach()
        logits = self.head(hidden)
        assert labels is not None
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss.detach() if self.fails else loss, "logits": logits}


DATA = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(24)]


@pytest.fixture(autouse=True)
def warnings_of_the_frameworks() -> Iterator[None]:
    """Their own warnings are none of our business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_importing_the_callbacks_imports_no_framework(tmp_path: Path) -> None:
    code = "import sys, gradctl.callbacks; assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True, timeout=60)
    assert dir(gradctl.callbacks) == gradctl.callbacks.__all__ == ["ExplainLightning", "ExplainTransformers"]


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the frameworks leave in a process by their first training, they leave before the tests look."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning.pytorch.callbacks import Callback
        from transformers import TrainerCallback

        trainer(Net(cut=False), TrainerCallback(), tmp_path_factory.mktemp("first")).train()
        fit(Net(cut=False), Callback(), tmp_path_factory.mktemp("first"), steps=1)
    gc.collect()


# ---------------------------------------------------------------------------------------------- transformers


def trainer(model: nn.Module, callback: Any, folder: Path) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=6, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=DATA, callbacks=[callback])


def test_the_first_steps_of_a_trainer_are_explained_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = gradctl.callbacks.ExplainTransformers(steps=2)
    found = trainer(Net(cut=True), callback, tmp_path)
    found.train()
    assert found.state.global_step == 6
    assert [(f.slug, f.parameters) for f in callback.findings] == [("detach", ("tower.bias", "tower.weight"))]
    assert CUT in capsys.readouterr().err
    assert "training_step" not in vars(found)


def test_a_trainer_is_stopped_by_an_error_that_names_the_line(tmp_path: Path) -> None:
    gc.collect()  # an optimizer of an earlier test that is still there would be waited for, by one step
    found = trainer(Net(cut=True), gradctl.callbacks.ExplainTransformers(steps=2, stop=True, quiet=True), tmp_path)
    with pytest.raises(gradctl.BrokenGradients, match=r"detach at .*test_explain_integrations\.py:\d+") as caught:
        found.train()
    assert found.state.global_step == 2
    assert caught.value.what
    assert caught.value.fix
    assert "training_step" not in vars(found)


def test_a_healthy_trainer_runs_through(tmp_path: Path) -> None:
    callback = gradctl.callbacks.ExplainTransformers(steps=2, stop=True, quiet=True)
    found = trainer(Net(cut=False), callback, tmp_path)
    found.train()
    assert found.state.global_step == 6
    assert callback.findings == []


def test_an_error_in_a_trainers_step_is_explained_and_passes(tmp_path: Path) -> None:
    callback = gradctl.callbacks.ExplainTransformers(quiet=True)
    found = trainer(Net(cut=False, fails=True), callback, tmp_path)
    with pytest.raises(RuntimeError, match="does not require grad"):
        found.train()
    assert [f.slug for f in callback.findings] == ["detach"]
    assert "training_step" not in vars(found)


def test_a_trainer_that_ends_early_is_reported_all_the_same(tmp_path: Path) -> None:
    callback = gradctl.callbacks.ExplainTransformers(steps=100, quiet=True)
    trainer(Net(cut=True), callback, tmp_path).train()
    assert [f.slug for f in callback.findings] == ["detach"]


# ---------------------------------------------------------------------------------------------- lightning


def fit(model: nn.Module, callback: Any, folder: Path, steps: int = 6) -> Any:
    import lightning
    from torch.utils.data import DataLoader

    class Wrapped(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    fitting = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=folder,
    )  # fmt: skip
    fitting.fit(Wrapped(), DataLoader(DATA, batch_size=4))  # type: ignore[arg-type]
    return fitting


def test_the_first_steps_of_lightning_are_explained_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = gradctl.callbacks.ExplainLightning(steps=2)
    assert fit(Net(cut=True), callback, tmp_path).global_step == 6
    assert [(f.slug, f.parameters) for f in callback.findings] == [("detach", ("net.tower.bias", "net.tower.weight"))]
    assert CUT in capsys.readouterr().err


def test_lightning_is_stopped_by_an_error_that_names_the_line(tmp_path: Path) -> None:
    callback = gradctl.callbacks.ExplainLightning(steps=2, stop=True, quiet=True)
    with pytest.raises(gradctl.BrokenGradients, match=r"detach at .*test_explain_integrations\.py:\d+"):
        fit(Net(cut=True), callback, tmp_path)


def test_healthy_lightning_runs_through_and_an_error_is_explained(tmp_path: Path) -> None:
    callback = gradctl.callbacks.ExplainLightning(steps=2, stop=True, quiet=True)
    assert fit(Net(cut=False), callback, tmp_path).global_step == 6
    assert callback.findings == []
    callback = gradctl.callbacks.ExplainLightning(quiet=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        fit(Net(cut=False, fails=True), callback, tmp_path)
    assert [f.slug for f in callback.findings] == ["detach"]


def test_steps_that_are_no_number_are_refused_before_training() -> None:
    with pytest.raises(gradctl.UsageError, match="steps="):
        gradctl.callbacks.ExplainLightning(steps=0)
    with pytest.raises(gradctl.UsageError, match="steps="):
        gradctl.callbacks.ExplainTransformers(steps=-1)
