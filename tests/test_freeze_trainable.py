"""`trainable` tells what trains, what does not, and why."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import gradctl
from gradctl import UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.lm_head.weight = self.wte.weight
        self.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
        self.lazy = nn.LazyLinear(2)


def told(model: nn.Module, **options: object) -> dict[str, tuple[bool, int, str]]:
    found = gradctl.trainable(model, **options)  # type: ignore[arg-type]
    return {row.name: (row.trains, row.num_trained, row.why) for row in found.rows}


def test_each_parameter_says_whether_it_trains_and_why() -> None:
    model = Net()
    model.body[0].bias.requires_grad_(False)
    first = gradctl.freeze(model, "body.1")
    second = gradctl.unfreeze(model, "body.0.bias")
    third = gradctl.freeze(model, rows={"re:(wte|lm_head).weight": range(3)})
    model.body[2].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.wte.parameters(), *model.body[:2].parameters()], lr=0.1)
    rows = told(model, optimizer=optimizer)
    here = "tests/test_freeze_trainable.py:"
    assert rows["wte.weight"][:2] == (True, 28)
    assert rows["wte.weight"][2].startswith("rows 0-2 of 10 frozen by freeze() at " + here)
    assert rows["wte.weight"][2].endswith("; tied to lm_head.weight")
    assert rows["body.0.weight"] == (True, 16, "")
    assert rows["body.0.bias"][0]
    assert rows["body.0.bias"][2].startswith("by unfreeze('body.0.bias') at " + here)
    assert rows["body.1.weight"][:2] == (False, 0)
    assert rows["body.1.weight"][2].startswith("frozen by freeze('body.1') at " + here)
    assert rows["body.2.weight"] == (False, 0, "not in the optimizer")
    assert rows["body.2.bias"] == (False, 0, "requires_grad=False, set outside of gradctl")
    assert rows["codes"] == (False, 0, "torch.int8 has no gradient")
    assert rows["lazy.weight"][2] == "not in the optimizer; no shape before the first forward"
    assert rows["body.1.running_mean"][2].startswith("statistics stand still: freeze('body.1')")
    assert "lm_head.weight" not in rows
    for handle in (first, second, third):
        handle.remove()


def test_rows_that_overlap_are_counted_once() -> None:
    model = nn.Embedding(10, 4)
    with gradctl.freeze(model, rows={"weight": range(4)}), gradctl.freeze(model, rows={"weight": [3, 9]}):
        assert gradctl.trainable(model).num_trained == 20


def test_a_flag_that_somebody_has_set_after_a_freeze_is_told() -> None:
    model = Net()
    frozen = gradctl.freeze(model, "body.0")
    model.body[0].weight.requires_grad_(True)
    trains, _, why = told(model)["body.0.weight"]
    assert trains
    assert why.startswith("requires_grad=True was set after freeze('body.0') at ")
    frozen.remove()
    assert told(model)["body.0.weight"] == (True, 16, "")


def test_statistics_that_move_beside_frozen_parameters_are_told() -> None:
    model = Net()
    model.body[1].requires_grad_(False)
    assert told(model)["body.1.running_var"][2] == "statistics move in training mode although its parameters do not"
    model.eval()
    assert told(model)["body.1.running_var"][2] == ""


def test_the_table_has_one_line_for_what_is_alike_and_the_totals_add_up() -> None:
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))))
    model.add_module("norm", nn.BatchNorm1d(4))
    model.add_module("head", nn.Linear(4, 2))
    with gradctl.freeze(model, "encoder", "norm"):
        found = gradctl.trainable(model)
        lines = str(found).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["elements", "trains", "why"],
        ["encoder", "240", "no"],
        ["norm", "8", "no"],
        ["head", "10", "yes"],
        ["norm", "9", "-"],
        ["Sequential:", "10", "of"],
    ]
    assert lines[-1] == "Sequential: 10 of 258 elements train (3.88 %)"
    assert (found.num_trained, found.num_parameters) == (10, 258)
    assert found.names() == ["head.weight", "head.bias"]
    assert len(found.names(trains=False)) == 26
    html = found._repr_html_()
    assert html.count("<tr>") == 5
    assert "&#x27;encoder&#x27;" in html


def test_it_goes_to_json() -> None:
    found = gradctl.trainable(nn.Linear(2, 3))
    data = json.loads(json.dumps(found.to_json()))
    assert (data["schema"], data["model"], data["num_parameters"], data["num_trained"]) == (
        "gradctl.trainable/1",
        "Linear",
        9,
        9,
    )
    assert data["rows"][0] == {
        "name": "weight",
        "kind": "parameter",
        "shape": [3, 2],
        "num_elements": 6,
        "num_trained": 6,
        "trains": True,
        "why": "",
        "tied_to": [],
    }


def test_it_changes_nothing_and_takes_an_empty_model() -> None:
    assert str(gradctl.trainable(nn.ReLU())).endswith("ReLU: 0 of 0 elements train (0 %)")
    with pytest.raises(UsageError, match="trainable of a dict"):
        gradctl.trainable({})  # type: ignore[arg-type]
