"""`gradctl.explain`, `gradctl.watch` and `gradctl.testing` in a program: what they find, restore and refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl
from gradctl import Finding, Findings, UsageError
from gradctl.testing import assert_gradients_flow


class Net(nn.Module):
    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.tower(x))
        if self.cut:
            hidden = hidden.detach()
        return self.head(hidden)


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 2, (16,), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def training(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    return step


def marked(finding: Finding) -> str:
    """Return the source line that a finding points to."""
    assert finding.primary is not None
    path = Path(finding.primary.file)
    text = (path if path.is_absolute() else Path.cwd() / path).read_text(encoding="utf-8")
    return text.splitlines()[finding.primary.line - 1].strip()


CUT = "hidden = hidden.detach()"

# ---------------------------------------------------------------------------------------------- explain


def test_a_step_that_returns_its_loss_is_explained_by_the_line_that_cuts() -> None:
    model = Net(cut=True)
    found = gradctl.explain(lambda: loss_of(model), model)
    assert [(f.slug, f.severity, f.parameters) for f in found] == [("detach", "error", ("tower.bias", "tower.weight"))]
    assert marked(found[0]) == CUT
    assert found[0].path.startswith("tower.")


def test_a_step_that_trains_by_itself_is_explained_without_being_told_the_model() -> None:
    model = Net(cut=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = gradctl.explain(training(model, optimizer))
    assert [f.slug for f in found] == ["detach"]
    assert marked(found[0]) == CUT


def test_a_step_that_calls_backward_only_is_asked_for_the_optimizers_parameters() -> None:
    model = Net(cut=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model.zero_grad()
        loss_of(model).backward()

    assert [f.slug for f in gradctl.explain(step, optimizer=optimizer)] == ["detach"]


@pytest.mark.parametrize("with_model", [False, True])
def test_a_healthy_step_has_no_findings(with_model: bool) -> None:
    model = Net(cut=False)
    found = gradctl.explain(lambda: loss_of(model), model if with_model else None)
    assert found == []
    assert "nothing is wrong" in str(found)


def test_a_gradient_that_was_there_is_left_as_it_was_found() -> None:
    model = Net(cut=False)
    loss_of(model).backward()
    objects = [p.grad for p in model.parameters()]
    numbers = [g.clone() for g in objects if g is not None]
    fresh = Net(cut=False)
    gradctl.explain(lambda: loss_of(model), model)
    gradctl.explain(lambda: loss_of(fresh), fresh)
    assert all(p.grad is g for p, g in zip(model.parameters(), objects, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(numbers, [g for g in objects if g is not None], strict=True))
    assert all(p.grad is None for p in fresh.parameters())


def test_a_fault_that_needs_two_steps_is_found_by_the_second_call() -> None:
    model = nn.Linear(4, 4)
    state: list[Tensor] = [torch.zeros(4)]

    def step() -> Tensor:
        state[0] = torch.tanh(model(state[0]))
        return state[0].sum()

    found = gradctl.explain(step, model)
    assert [f.slug for f in found] == ["stale_graph_carried"]


def test_a_loss_that_became_a_number_is_explained() -> None:
    model = Net(cut=False)
    found = gradctl.explain(lambda: loss_of(model).item(), model)
    assert [f.slug for f in found] == ["loss_not_tensor"]


@pytest.mark.parametrize(
    "wrap", [lambda loss: {"loss": loss, "logits": 0}, lambda loss: type("Out", (), {"loss": loss})()]
)
def test_the_loss_may_come_in_a_mapping_or_an_object(wrap: Callable[[Tensor], Any]) -> None:
    model = Net(cut=True)
    assert [f.slug for f in gradctl.explain(lambda: wrap(loss_of(model)), model)] == ["detach"]


def test_an_error_that_is_not_about_gradients_passes() -> None:
    model = Net(cut=False)
    with pytest.raises(ZeroDivisionError):
        gradctl.explain(lambda: 1 / 0, model)


def test_of_a_loss_only_the_graph_is_told_and_that_is_said() -> None:
    model = Net(cut=True)
    found = gradctl.explain(loss_of(model), model)
    assert [(f.slug, f.parameters) for f in found] == [("unknown", ("tower.bias", "tower.weight"))]
    assert found[0].primary is None
    assert len(found.remarks) == 1
    assert "pass explain() a function" in found.remarks[0]
    assert gradctl.explain(loss_of(Net(cut=False))) == []


def test_a_loss_without_history_a_vector_and_a_nan_are_told() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert [f.slug for f in gradctl.explain((weight * 2).sum().detach())] == ["unknown"]
    assert [f.slug for f in gradctl.explain(weight * 2)] == ["non_scalar_loss"]
    assert [f.slug for f in gradctl.explain((weight * float("nan")).sum())] == ["nonfinite"]


def test_a_parameter_that_the_loss_reaches_and_no_optimizer_holds_is_told() -> None:
    model = Net(cut=False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    found = gradctl.explain(loss_of(model), model, optimizer)
    assert [(f.slug, f.parameters) for f in found] == [("param_not_in_optimizer", ("tower.bias", "tower.weight"))]


def test_reading_a_graph_leaves_the_loss_usable() -> None:
    model = Net(cut=False)
    loss = loss_of(model)
    gradctl.explain(loss, model)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


MODEL = Net(cut=False)


def emptied() -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"].clear()
    return optimizer


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gradctl.explain(3.0), "explain() was given a float"),  # type: ignore[arg-type]
        (lambda: gradctl.explain(MODEL), "a model (Net) is not a training step"),
        (lambda: gradctl.explain(lambda batch: None), "cannot be called without arguments"),  # type: ignore[misc]
        (lambda: gradctl.explain(lambda: None, MODEL), "returned nothing and called no backward"),
        (lambda: gradctl.explain(lambda: "loss", MODEL), "returned a str"),
        (lambda: gradctl.explain(lambda: loss_of(MODEL), Net(cut=False)), "computes nothing with this Net"),
        (lambda: gradctl.explain(loss_of(MODEL), Net(cut=False)), "reaches none of the 4 parameters"),
        (lambda: gradctl.explain(lambda: loss_of(MODEL), nn.ReLU()), "this ReLU has no parameters"),
        (lambda: gradctl.explain(lambda: loss_of(MODEL), "net"), "model is a str"),  # type: ignore[arg-type]
        (lambda: gradctl.explain(lambda: loss_of(MODEL), None, MODEL), "optimizer is a Net"),  # type: ignore[arg-type]
        (lambda: gradctl.explain(lambda: loss_of(MODEL), None, emptied()), "this SGD holds no parameters"),
        (lambda: gradctl.watch(steps=0), "watch(steps=0)"),
        (lambda: gradctl.watch(steps=True), "watch(steps=True)"),
        (lambda: gradctl.watch("net"), "model is a str"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_use_is_refused_with_a_fix(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert words in caught.value.headline
    assert caught.value.fix


def test_explain_under_no_grad_is_refused() -> None:
    with torch.no_grad(), pytest.raises(UsageError, match="gradients are switched off where"):
        gradctl.explain(lambda: loss_of(MODEL), MODEL)


# ---------------------------------------------------------------------------------------------- watch


def test_watched_steps_are_explained_on_stderr_and_in_the_handle(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net(cut=True)
    step = training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with gradctl.watch(model) as seen:
        step()
        step()
    assert [f.slug for f in seen.findings] == ["detach"]
    assert seen.steps == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("gradctl: 1 cause found in the gradients of 2 steps\n")
    assert CUT in told.err


def test_after_the_last_step_that_was_asked_for_nothing_is_traced(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net(cut=True)
    step = training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    running: list[bool] = []
    with gradctl.watch(model, steps=2, quiet=True) as seen:
        for _ in range(4):
            step()
            running.append(seen.running)
    assert running == [True, False, False, False]
    assert seen.steps == 2
    assert [f.slug for f in seen.findings] == ["detach"]
    assert capsys.readouterr().err == ""


def test_of_two_optimizers_both_make_the_steps_that_were_asked_for() -> None:
    model = Net(cut=True)
    one = torch.optim.SGD(model.head.parameters(), lr=0.1)
    two = torch.optim.SGD(model.tower.parameters(), lr=0.1)
    with gradctl.watch(steps=1, quiet=True) as seen:
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
            one.step()
            two.step()
    assert [f.slug for f in seen.findings] == ["detach"]


def test_an_error_is_explained_and_passes_through() -> None:
    weight = torch.ones(3, requires_grad=True)
    seen = gradctl.watch(quiet=True)

    def twice() -> None:
        with seen:
            loss = (weight * weight).sum()
            loss.backward()
            loss.backward()

    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        twice()
    assert [f.slug for f in seen.findings] == ["graph_reused"]


def test_a_watch_can_be_started_and_stopped_by_hand_once() -> None:
    model = Net(cut=False)
    step = training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    watch = gradctl.watch(model, quiet=True).start()
    step()
    assert watch.stop() == []
    assert watch.stop() == []
    assert watch.steps == 1
    with pytest.raises(UsageError, match="has been started before"):
        watch.start()


def test_watches_do_not_nest_and_the_outer_one_goes_on() -> None:
    model = Net(cut=False)
    with gradctl.watch(model, quiet=True) as seen:
        with pytest.raises(UsageError, match="traced already"):
            gradctl.watch(quiet=True).start()
        with pytest.raises(UsageError, match="traced already"):
            gradctl.explain(lambda: loss_of(model), model)
        assert seen.running


# ---------------------------------------------------------------------------------------------- findings


def test_findings_show_themselves_in_a_notebook_with_what_they_say_escaped() -> None:
    found = gradctl.explain(lambda: loss_of(model), model) if (model := Net(cut=True)) else Findings()
    page = found._repr_html_()
    assert "detach" in page
    assert "tower.weight" in page
    assert CUT in page
    odd = Findings([Finding("detach", "error", "<b>x</b>", "a & b", "fix")])._repr_html_()
    assert "<b>x</b>" not in odd
    assert "&lt;b&gt;x" in odd


def test_notes_are_no_causes_in_the_headline() -> None:
    note = Finding("detach", "note", "s", "w", "f")
    assert Findings([note]).headline == "nothing is wrong with the gradients"
    assert Findings([note, Finding("detach", "error", "s", "w", "f")], subject="3 steps").headline == (
        "1 cause found in the gradients of 3 steps"
    )


# ---------------------------------------------------------------------------------------------- testing


def test_a_model_whose_gradients_flow_passes() -> None:
    model = Net(cut=False)
    assert_gradients_flow(lambda: loss_of(model), model)
    assert_gradients_flow(training(model, torch.optim.SGD(model.parameters(), lr=0.1)), model)


def test_a_parameter_without_a_gradient_fails_with_the_explanation() -> None:
    model = Net(cut=True)
    with pytest.raises(AssertionError) as caught:
        assert_gradients_flow(lambda: loss_of(model), model)
    text = str(caught.value)
    assert text.startswith("2 of 4 parameters got no gradient: tower.weight, tower.bias\n")
    assert CUT in text
    assert "fix" in text


@pytest.mark.parametrize("except_", [["tower.*"], ("tower.weight", "tower.bias"), "tower.*"])
def test_what_is_excepted_may_go_without(except_: Any) -> None:
    model = Net(cut=True)
    assert_gradients_flow(lambda: loss_of(model), model, except_=except_)


def test_a_frozen_parameter_is_not_asked_for_a_gradient() -> None:
    model = Net(cut=True)
    model.tower.requires_grad_(False)
    assert_gradients_flow(lambda: loss_of(model), model)


def test_a_gradient_of_zero_and_one_of_nan_fail() -> None:
    model = Net(cut=False)
    with pytest.raises(AssertionError, match="4 of 4 parameters got a gradient of zero"):
        assert_gradients_flow(lambda: loss_of(model) * 0.0, model)
    with pytest.raises(AssertionError, match="4 of 4 parameters got a gradient that is not finite"):
        assert_gradients_flow(lambda: loss_of(model) * float("nan"), model)


def test_a_pattern_that_matches_nothing_and_a_frozen_model_are_refused() -> None:
    model = Net(cut=False)
    with pytest.raises(UsageError, match="'towr"):
        assert_gradients_flow(lambda: loss_of(model), model, except_=["towr.*"])
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter of the model requires a gradient"):
        assert_gradients_flow(lambda: loss_of(model), model)


def test_an_assertion_needs_no_second_call() -> None:
    calls: list[int] = []
    model = Net(cut=False)

    def step() -> Tensor:
        calls.append(1)
        return loss_of(model)

    assert_gradients_flow(step, model)
    assert calls == [1]
