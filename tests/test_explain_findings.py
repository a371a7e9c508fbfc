"""What a finding tells besides its line: the parameters behind it, the way to the loss, what else is wrong."""

from __future__ import annotations

import runpy
from pathlib import Path

from gradctl._explain._tracing import Tracing
from gradctl._results import Finding

HEAD = """import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
"""
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
x, y = torch.randn(4, 3), torch.randn(4, 1)
"""


def findings(folder: Path, body: str, *, notes: bool = False) -> list[Finding]:
    script = folder / "program.py"
    script.write_text(HEAD + body)
    tracing = Tracing(script=str(script), notes=notes)
    tracing.start()
    error: Exception | None = None
    try:
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception as raised:
            error = raised
        found = tracing.findings(error)
    finally:
        tracing.stop()
    assert tracing.faults == []
    return found


def line_of(body: str, mark: str) -> int:
    return 1 + next(n for n, line in enumerate((HEAD + body).splitlines()) if line.endswith(f"# {mark}"))


ALL = ("body.bias", "body.weight", "head.bias", "head.weight")


def test_a_loss_refused_in_a_region_names_the_parameters_behind_it_and_begins_at_one(tmp_path: Path) -> None:
    [found] = findings(tmp_path, NET + "with torch.no_grad():\n    (net(x) - y).pow(2).mean().backward()\n")
    assert found.slug == "no_grad"
    assert found.parameters == ALL
    assert found.path in (
        "body.weight → ✗ linear → relu → linear → sub → pow → mean → loss",
        "body.bias → ✗ linear → relu → linear → sub → pow → mean → loss",
    )


def test_a_loss_refused_by_a_decorator_names_the_parameters_behind_it(tmp_path: Path) -> None:
    [found] = findings(
        tmp_path,
        NET + "@torch.no_grad()\ndef predict():\n    return net(x)\n\n\n(predict() - y).pow(2).mean().backward()\n",
    )
    assert found.slug == "no_grad"
    assert found.parameters == ALL
    assert found.path.startswith("body.")
    assert found.path.endswith(" → loss")


def test_a_loss_made_of_numbers_names_the_parameters_that_the_numbers_came_from(tmp_path: Path) -> None:
    [found] = findings(
        tmp_path,
        NET + "losses = [(net(x) - y).pow(2).mean().item() for _ in range(2)]\nloss = torch.tensor(losses).sum()\n"
        "loss.requires_grad_(False)\nloss.backward()\n",
    )
    assert found.slug == "item"
    assert found.parameters == ALL
    assert found.path.endswith(" → mean → ✗ item → … → tensor → sum → loss")
    assert found.path.startswith(("body.", "head."))


STEPS = "for _ in range(4):\n    optimizer.zero_grad()\n"


def test_the_path_goes_on_where_a_number_came_back(tmp_path: Path) -> None:
    body = (
        NET
        + "style = nn.Linear(3, 1)\noptimizer.add_param_group({'params': style.parameters()})\n"
        + STEPS
        + "    extra = style(x).mean().item()\n    ((net(x) - y).pow(2).mean() + extra).backward()\n"
        + "    optimizer.step()\n"
    )
    [found] = findings(tmp_path, body)
    assert found.slug == "item"
    assert found.path in [f"{kind} → linear → mean → ✗ item → … → add → loss" for kind in ("weight", "bias")]


def test_the_path_of_a_zero_and_of_a_nan_goes_from_a_parameter_to_the_loss(tmp_path: Path) -> None:
    zero = NET + STEPS + "    (F.softmax(net(x), dim=-1) - y).pow(2).mean().backward()\n    optimizer.step()\n"
    [found] = findings(tmp_path, zero)
    assert found.slug == "zero_grad_size_one"
    assert found.path in (f"head.{kind} → linear → ✗ softmax → sub → pow → mean → loss" for kind in ("weight", "bias"))
    nan = NET + STEPS + "    torch.log(net(x)).mean().backward()\n    optimizer.step()\n"
    found = findings(tmp_path, nan)[0]
    assert found.slug == "nan_log"
    assert found.path in (f"head.{kind} → linear → ✗ log → mean → loss" for kind in ("weight", "bias"))
