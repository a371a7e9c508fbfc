"""What a finding tells besides its line: the parameters behind it, the way to the loss, what else is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import explained
from gradctl._lineage import _frames
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
    return explained.findings(folder, HEAD + body, notes=notes, may_raise=True)


def line_of(body: str, mark: str) -> int:
    return explained.line_of(HEAD + body, mark)


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


LIBRARY = """import torch


@torch.no_grad()
def generate(net, x):
    return net(x)


def score(net, x):
    with torch.no_grad():
        return net(x)


@torch.inference_mode()
def infer(net, x):
    return net(x)
"""


@pytest.fixture
def library(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package `somelib`."""
    installed = tmp_path_factory.mktemp("environment") / "site-packages"
    (installed / "somelib").mkdir(parents=True)
    (installed / "somelib" / "__init__.py").touch()
    (installed / "somelib" / "making.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(installed))
    for name in ("somelib", "somelib.making"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(_frames, "_NOT_USER", (*_frames._NOT_USER, f"{installed.resolve()}/"))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("function", "slug", "line"),
    [("generate", "no_grad", 4), ("score", "no_grad", 10), ("infer", "inference_mode", 14)],
)
def test_where_a_library_cuts_the_users_line_is_named_and_the_librarys_is_evidence(
    function: str, slug: str, line: int, tmp_path: Path
) -> None:
    body = NET + f"from somelib.making import {function}\n\nout = {function}(net, x)  # here\nout.mean().backward()\n"
    [found] = findings(tmp_path, body)
    assert found.primary is not None
    assert (found.slug, found.primary.line) == (slug, line_of(body, "here"))
    assert [(s.file, s.line) for s in found.evidence if s.role == "library"] == [("somelib/making.py", line)]
    assert found.why.startswith(f"{function}() of somelib runs without gradients")


BESIDE = (
    NET + "tower = nn.Linear(3, 1)\noptimizer.add_param_group({'params': tower.parameters()})\n"
    "for step in range(5):\n    optimizer.zero_grad()\n    side = tower(x).detach()  # cut\n"
    "    loss = (net(x) + side - y).pow(2).mean()\n"
)


def test_a_silent_cut_beside_an_error_is_told_after_it(tmp_path: Path) -> None:
    body = (
        BESIDE + "    if step == 4:\n        loss = (net(x).detach() - y).pow(2).mean()  # error\n"
        "    loss.backward()\n    optimizer.step()\n"
    )
    found = findings(tmp_path, body)
    assert [(f.slug, f.primary and f.primary.line) for f in found] == [
        ("detach", line_of(body, "error")),
        ("detach", line_of(body, "cut")),
    ]
    assert found[1].parameters == ("bias", "weight")


def test_what_an_error_explains_is_not_told_again(tmp_path: Path) -> None:
    body = (
        NET + "for step in range(4):\n    optimizer.zero_grad()\n    hidden = net.body(x)\n"
        "    if step > 1:\n        hidden = hidden.detach()\n    loss = net.head(hidden).mean()\n    if step == 3:\n"
        "        loss = loss.detach()  # error\n    loss.backward()\n    optimizer.step()\n"
    )
    found = findings(tmp_path, body)
    assert [(f.slug, f.primary and f.primary.line) for f in found] == [("detach", line_of(body, "error"))]


NOTED = (
    NET
    + """


def evaluate():
    with torch.no_grad():  # region
        return (net(x) - y).abs().mean()


for step in range(5):
    optimizer.zero_grad()
    out = net(x)
    target = out.detach()  # target
    loss = (out - y).pow(2).mean() + (net(2 * x) - target).pow(2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    print(loss.item(), float(loss))  # log
    labels = y.detach()
evaluate()
"""
)


def test_harmless_breaks_are_told_as_notes_once_a_line_and_only_when_asked_for(tmp_path: Path) -> None:
    assert findings(tmp_path, NOTED) == []
    found = findings(tmp_path, NOTED, notes=True)
    told = {(f.slug, f.primary.line): f.why.rpartition("; ")[2] for f in found if f.primary}
    assert told == {
        ("no_grad", line_of(NOTED, "region")): "it is used for numbers only",
        ("detach", line_of(NOTED, "target")): "every parameter behind it gets a gradient by another way",
        ("item", line_of(NOTED, "log")): "it is used for numbers only",
    }
    assert len(found) == 3
    assert {f.severity for f in found} == {"note"}
    assert max(f.confidence for f in found) <= 0.4
    assert {f.parameters for f in found} == {ALL}


def test_a_break_that_explains_a_symptom_is_no_note(tmp_path: Path) -> None:
    body = (
        NET + "for step in range(4):\n    optimizer.zero_grad()\n    hidden = net.body(x).detach()  # cause\n"
        "    net.head(hidden).mean().backward()\n    optimizer.step()\n"
    )
    [found] = findings(tmp_path, body, notes=True)
    assert (found.slug, found.severity) == ("detach", "error")
    assert found.primary is not None
    assert found.primary.line == line_of(body, "cause")


@pytest.mark.usefixtures("library")
def test_a_break_inside_of_a_library_is_no_note(tmp_path: Path) -> None:
    body = (
        NET + "from somelib.making import generate, score\n\n" + STEPS + "    (net(x) - y).pow(2).mean().backward()\n"
        "    optimizer.step()\n    generate(net, x), score(net, x)\n"
    )
    assert findings(tmp_path, body, notes=True) == []


def test_there_are_at_most_twenty_notes(tmp_path: Path) -> None:
    body = NET + STEPS + "    loss = net(x).pow(2).mean()\n    loss.backward()\n    optimizer.step()\n"
    body += "".join(f"    number{n} = loss.item()\n" for n in range(30))
    assert len(findings(tmp_path, body, notes=True)) == 20
