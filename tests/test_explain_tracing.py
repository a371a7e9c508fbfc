"""When a traced run has learned enough: not before the symptom, not before it is sure, and never in the wrong cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradctl import Finding
from gradctl._explain import Tracing
from gradctl._explain._symptoms import Symptom, explained

pytestmark = pytest.mark.usefixtures("no_optimizers_of_other_tests")


def steps_until_done(
    *, symptoms: list[Symptom] | None = None, limit: int = 60, cut_from: int = 1, **options: Any
) -> int | None:
    """Train with a hidden layer that is cut from some step on; return the step at which the trace was done."""
    done: list[int] = []
    tracing = Tracing(
        symptoms=[symptom.to_json() for symptom in symptoms or []],
        on_done=lambda: done.append(tracing.steps),
        **options,
    )
    tracing.start()
    try:
        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(1, limit + 1):
            hidden = model["body"](torch.randn(8, 4))
            if step >= cut_from:
                hidden = hidden.detach()
            optimizer.zero_grad()
            model["head"](hidden).pow(2).mean().backward()
            optimizer.step()
        assert tracing.faults == []
    finally:
        tracing.stop()
    assert len(done) <= 1
    return done[0] if done else None


NONE = Symptom("none", "2 parameters got no gradient", None, ("body.weight", "body.bias"))


def test_it_is_done_a_few_steps_after_the_symptom_is_explained() -> None:
    done = steps_until_done(symptoms=[NONE])
    assert done is not None
    assert 6 <= done <= 10


def test_it_is_not_done_before_the_step_of_the_symptom() -> None:
    lost = Symptom("lost", "had a gradient and had none at step 20", 20, ("body.weight", "body.bias"))
    done = steps_until_done(symptoms=[lost], cut_from=20)
    assert done is not None
    assert 23 <= done <= 40


def test_it_is_not_done_while_one_of_several_symptoms_is_unexplained() -> None:
    assert steps_until_done(symptoms=[NONE, Symptom("nonfinite", "NaN at step 2", 2, ("head.weight",))]) is None


def test_an_error_of_the_program_is_waited_for() -> None:
    assert steps_until_done(symptoms=[NONE, Symptom("grad_error", "RuntimeError", 61)]) is None


def test_what_was_meant_is_looked_at_for_some_steps_only() -> None:
    done = steps_until_done(symptoms=[Symptom("left_autograd", "a value left", 2)], cut_from=1000)
    assert done is not None
    assert 20 <= done <= 40


def test_without_symptoms_it_looks_to_the_end() -> None:
    assert steps_until_done() is None


@pytest.mark.parametrize("steps", [1, 4])
def test_it_is_done_after_the_steps_that_were_asked_for(steps: int) -> None:
    assert steps_until_done(steps=steps) == steps


def test_the_step_that_matters_is_reached_and_looked_at_in_full() -> None:
    done = steps_until_done(symptoms=[NONE], at_step=30)
    assert done is not None
    assert 33 <= done <= 45


def test_numbers_are_looked_at_from_shortly_before_the_step_that_matters() -> None:
    seen: list[bool] = []
    tracing = Tracing(at_step=6)
    tracing.start()
    try:
        weight = torch.ones(2, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(6):
            seen.append(tracing.context.tracer.numerics)
            (weight * 2).sum().backward()
            optimizer.step()
    finally:
        tracing.stop()
    assert seen[0] is False
    assert seen[-1] is True


def finding(slug: str, confidence: float = 0.9, parameters: tuple[str, ...] = (), **options: Any) -> Finding:
    return Finding(slug, options.get("severity", "error"), "s", "w", "f", confidence=confidence, parameters=parameters)


@pytest.mark.parametrize(
    ("symptom", "found", "wanted"),
    [
        (NONE, [finding("detach")], True),
        (NONE, [finding("detach", parameters=("body.weight", "body.bias"))], True),
        (NONE, [finding("detach", parameters=("body.weight",))], False),
        (NONE, [finding("detach", parameters=("body.weight",)), finding("data", parameters=("body.bias",))], True),
        (NONE, [finding("detach", 0.7)], False),
        (NONE, [finding("detach", severity="note")], False),
        (NONE, [finding("nan_sqrt")], False),
        (NONE, [], False),
        (Symptom("nonfinite", ""), [finding("nan_where")], True),
        (Symptom("nonfinite", ""), [finding("exploded_grad")], True),
        (Symptom("zero", ""), [finding("zero_grad_relu")], True),
        (Symptom("zero", ""), [finding("detach")], False),
        (Symptom("uncleared", ""), [finding("missing_zero_grad")], True),
        (Symptom("something new", ""), [finding("detach")], False),
    ],
)
def test_a_symptom_is_explained_by_a_sure_finding_that_can_cause_it(
    symptom: Symptom, found: list[Finding], wanted: bool
) -> None:
    assert explained(symptom.to_json(), found) is wanted


def test_names_are_found_while_the_function_that_holds_the_model_runs() -> None:
    def main() -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model[1](model[0](torch.ones(2, 3)).detach()).sum().backward()
            optimizer.step()

    assert found_names(main) == ("0.bias", "0.weight")


def found_names(main: Callable[[], None]) -> tuple[str, ...]:
    tracing = Tracing()
    tracing.start()
    try:
        main()
        [found] = tracing.findings()
    finally:
        tracing.stop()
    assert tracing.findings() == [found]
    return found.parameters
