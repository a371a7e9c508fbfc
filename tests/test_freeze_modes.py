"""Running statistics and dropout of the frozen part are as asked, whatever `model.train()` says, and come back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

import gradctl
import settled

settled.compiling()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.BatchNorm1d(4, affine=False))
        )
        self.neck = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.encoder(x)))


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_statistics_of_the_frozen_part_stand_still_through_train_and_eval() -> None:
    model = Net()
    model(torch.randn(16, 3))
    before, neck = statistics(model.encoder), statistics(model.neck)
    with gradctl.freeze(model, "encoder"):
        for _ in range(2):
            model.train()
            model(torch.randn(16, 3) + 5)
            model.eval()
    assert equal(statistics(model.encoder), before)
    assert not equal(statistics(model.neck), neck)
    model.train()
    model(torch.randn(16, 3) + 5)
    assert not equal(statistics(model.encoder), before)


def test_the_frozen_part_computes_with_its_running_statistics() -> None:
    model, oracle = Net(), Net()
    x = torch.randn(16, 3)
    for net in (model, oracle):
        net.encoder[2].p = net.neck[2].p = 0.0
        torch.manual_seed(1)
        net(x)
    oracle.encoder[1].eval()
    oracle.encoder[3].eval()
    with gradctl.freeze(model, "encoder"):
        assert torch.equal(model(x), oracle(x))


@pytest.mark.parametrize("norm_stats", [True, False])
@pytest.mark.parametrize("dropout", ["keep", "off"])
def test_each_module_of_the_frozen_part_is_in_the_mode_that_was_asked_for(norm_stats: bool, dropout: Any) -> None:
    model = Net()
    with gradctl.freeze(model, "encoder", norm_stats=norm_stats, dropout=dropout):
        for training in (True, False, True):
            model.train(training)
            stats = training and not norm_stats
            rest = training and dropout == "keep"
            assert modes(model) == {
                "": training,
                "encoder": rest,
                "encoder.0": rest,
                "encoder.1": stats,
                "encoder.2": rest,
                "encoder.3": rest,
                "encoder.3.0": stats,
                "neck": training,
                "neck.0": training,
                "neck.1": training,
                "neck.2": training,
                "head": training,
            }
    assert all(modes(model).values())
    assert not any("train" in vars(module) for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_that_was_asked_for_last_comes_back(training: bool) -> None:
    model = Net()
    model.train(not training)
    frozen = gradctl.freeze(model, "encoder")
    model.train(training)
    frozen.remove()
    assert set(modes(model).values()) == {training}


def test_a_module_that_is_frozen_in_part_only_is_left_alone() -> None:
    model = Net()
    with gradctl.freeze(model, "*.weight", "!head.weight"):
        assert all(modes(model).values())
    with gradctl.freeze(model, "encoder.1"):
        assert [name for name, training in modes(model).items() if not training] == ["encoder.1"]


def test_overlapping_freezes_hold_a_mode_until_the_last_one_goes() -> None:
    model = Net()
    first, second = gradctl.freeze(model, "encoder"), gradctl.freeze(model, "encoder.1", "neck")
    first.remove()
    assert [name for name, training in modes(model).items() if not training] == ["encoder.1", "neck.1"]
    model.train()
    second.remove()
    assert all(modes(model).values())


def test_unfreezing_a_module_lets_its_statistics_move_until_it_is_taken_back() -> None:
    model = Net()
    frozen = gradctl.freeze(model, "encoder")
    warm = gradctl.unfreeze(model, "encoder.1")
    assert model.encoder[1].training
    assert model.encoder[1].weight.requires_grad
    model.eval()
    model.train()
    assert model.encoder[1].training
    warm.remove()
    assert not model.encoder[1].training
    frozen.remove()
    assert all(modes(model).values())


def test_who_sets_the_mode_itself_wins() -> None:
    model = Net()
    frozen = gradctl.freeze(model, "encoder")
    model.encoder[1].training = True
    frozen.remove()
    assert all(modes(model).values())


def test_a_norm_whose_flags_somebody_has_set_since_follows_the_next_train() -> None:
    model = Net()
    frozen = gradctl.freeze(model, "encoder")
    model.requires_grad_(True)
    model.train()
    assert model.encoder[1].training
    frozen.remove()
    assert all(modes(model).values())
    assert not any("train" in vars(module) for module in model.modules())


def test_a_train_of_the_modules_own_is_called_and_comes_back() -> None:
    calls: list[bool] = []

    class Counting(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Counting:
            calls.append(mode)
            return super().train(mode)

    model = nn.Sequential(Counting(3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    own = lambda mode=True: nn.Module.train(model[1], mode)  # noqa: E731
    vars(model[1])["train"] = own
    with gradctl.freeze(model, "0", "1"):
        model.train()
        assert calls == [True]
        assert not model[0].training
        assert not model[1].training
    assert vars(model[1])["train"] is own
    assert "train" not in vars(model[0])


@pytest.mark.parametrize("form", [parametrizations.spectral_norm, spectral_norm])
def test_the_power_iteration_of_spectral_norm_does_not_move_a_frozen_weight(form: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(form(nn.Linear(6, 6)), nn.Linear(6, 1))
    x = torch.randn(2, 6)
    with gradctl.freeze(model, "0"):
        model.train()
        first = model(x)
        assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)


def test_a_deep_copy_stays_still_while_its_parameters_are_frozen() -> None:
    model = Net()
    frozen = gradctl.freeze(model, "encoder")
    twin = copy.deepcopy(model)
    frozen.remove()
    assert model.encoder[1].training
    before = statistics(twin.encoder[1])
    twin.train()
    assert not twin.encoder[1].training
    twin(torch.randn(8, 3))
    assert equal(statistics(twin.encoder[1]), before)
    with gradctl.freeze(twin, "encoder"):
        assert not twin.encoder[1].training
    twin.encoder[1].requires_grad_(True)
    twin.train()
    assert twin.encoder[1].training
    assert not copy.deepcopy(twin).eval().encoder[1].training


def test_a_pickled_model_needs_no_gradctl_and_trains_as_any_other() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    frozen = gradctl.freeze(model, "0")
    data = pickle.dumps(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    frozen.remove()
    assert b"gradctl" not in data
    twin = pickle.loads(data)
    assert not twin[0].training
    assert twin.train()[0].training
    with gradctl.freeze(twin, "0"):
        assert not twin.train()[0].training
    assert twin[0].training
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))


def test_a_compiled_model_sees_the_statistics_stand_still() -> None:
    model = Net()
    model.encoder[2].p = model.neck[2].p = 0.0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 3)
    compiled(x)
    before = statistics(model.encoder)
    with gradctl.freeze(model, "encoder"):
        compiled.train()
        compiled(x)
        assert equal(statistics(model.encoder), before)
    compiled(x)
    assert not equal(statistics(model.encoder), before)
