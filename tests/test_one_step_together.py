"""Calls of one step used with each other: what one of them does by design is no fault to another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradctl


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def test_rows_that_are_frozen_are_no_wrong_gradient_to_check() -> None:
    model, x = network(), torch.randn(5, 4)
    elements = torch.zeros(8, dtype=torch.bool)
    elements[3] = True
    with gradctl.freeze(model, rows={"0.weight": [0, 1], "0.bias": elements}):
        found = gradctl.check(model, x)
        twice = gradctl.check(model, x, order=2)
    assert found == []
    assert twice == []
    assert any("frozen rows" in remark for remark in found.remarks)


def test_a_wrong_gradient_beside_frozen_rows_is_still_found() -> None:
    wrong = gradctl.custom_vjp(lambda x: x.exp(), lambda inputs, out, grad: 2 * grad * out)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return wrong(self.linear(x))

    torch.manual_seed(0)
    model = Model()
    with gradctl.freeze(model, rows={"linear.weight": [0, 1]}):
        found = gradctl.check(model, torch.randn(5, 4))
    assert [finding.slug for finding in found] == ["factor"]
    assert "linear.weight" in found[0].parameters


def test_a_row_that_is_tied_says_how_both_names_are_given() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 3), "head": nn.Linear(3, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(gradctl.FreezeRefused) as error:
        gradctl.freeze(model, rows={"embed.weight": range(4)})
    assert "embed.weight is tied to head.weight" in str(error.value)
    assert '"head.weight"' in str(error.value)
    assert "!embed.weight" not in str(error.value)  # takes away from patterns, and rows have none
    with gradctl.freeze(model, rows={"embed.weight": range(4), "head.weight": range(4)}):
        assert str(gradctl.trainable(model)).count("rows 0-3 of 6 frozen by") == 1


@pytest.mark.parametrize("first", ["freeze", "step"])
def test_frozen_rows_stand_still_under_an_update_in_the_backward(first: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(5, 4)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    early = gradctl.freeze(model, rows={"0.weight": [0, 3]}) if first == "freeze" else None
    with gradctl.Step(model, optimizer, update="in-backward") as step:
        frozen = early or gradctl.freeze(model, rows={"0.weight": [0, 3]})
        before = model[0].weight.detach().clone()
        for _ in range(3):
            step([x], loss)
        moved = (model[0].weight != before).any(1).tolist()
        assert moved == [False, True, True, False, True, True, True, True]
        assert not optimizer.state[model[0].weight]["exp_avg"][[0, 3]].any()
        frozen.remove()
        step([x], loss)
    assert (model[0].weight != before).any(1).all()
