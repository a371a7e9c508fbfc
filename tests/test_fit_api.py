"""`gradctl.fit`: the budget holds by the allocator's own account, and nothing but time and memory changes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import gradctl
from fit_models import MODELS, Training, training
from gradctl._errors import BudgetTooSmall, PlanMismatch
from gradctl._fit import Plan, _solve, fit
from gradctl._recompute import Tape

PREDICTED = 0.03
"""How far the allocator's peak may be from the predicted one, as a share; small models have more odd bytes."""


def smallest_of(made: Training) -> int:
    with pytest.raises(BudgetTooSmall) as caught:
        fit(made.model, made, memory=1)
    return caught.value.smallest


def plain_of(made: Training) -> int:
    plan = fit(made.model, made, memory="64GiB")
    assert plan.drops_nothing
    assert plan.measured_peak is not None
    return plan.measured_peak


def outcome(made: Training) -> list[Tensor]:
    """Loss, gradients, buffers and weights of one step from a fixed random state."""
    torch.manual_seed(5)
    loss = made()
    model: Any = made.model
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach().clone() for t in (loss, *grads, *model.buffers(), *model.parameters())]


def assert_bitwise(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), f"tensor {i} of shape {list(a.shape)} differs"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_budget_holds_and_gradients_and_buffers_are_bitwise_those_of_the_plain_step(name: str) -> None:
    made = training(name)
    smallest, plain = smallest_of(made), plain_of(made)
    assert smallest < plain
    budget = smallest + (plain - smallest) * 4 // 10
    plan = fit(made.model, made, memory=budget)
    assert plan.measured_peak is not None
    assert plan.measured_peak <= budget
    assert plan.measured_peak >= 0.95 * budget
    assert abs(plan.predicted_peak / plan.measured_peak - 1) < PREDICTED
    assert plan.predicted_slowdown >= 1
    planned = outcome(made)
    assert_bitwise(planned, outcome(training(name)))


def test_the_smallest_budget_that_is_said_works() -> None:
    made = training("unet")
    smallest = smallest_of(made)
    plan = fit(made.model, made, memory=smallest)
    assert plan.measured_peak is not None
    assert plan.measured_peak <= smallest


@pytest.fixture(scope="module")
def fitted() -> tuple[Training, Plan]:
    made = training("gpt")
    plan = fit(made.model, made, memory=6_500_000)
    assert not plan.drops_nothing
    plan.undo()
    return made, plan


def test_fitting_leaves_weights_gradients_optimizer_and_random_state_as_they_were() -> None:
    made, other = training("gpt"), training("gpt")
    torch.manual_seed(3)
    fit(made.model, made, memory=6_500_000)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(after, torch.get_rng_state())
    for p, q in zip(made.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
        for key, value in made.optimizer.state[p].items():
            assert torch.equal(value, other.optimizer.state[q][key])


def test_undo_gives_the_very_forward_back(fitted: tuple[Training, Plan]) -> None:
    made, plan = fitted
    assert "forward" not in vars(made.model)
    plan.apply(made.model)
    assert "forward" in vars(made.model)
    plan.undo()
    plan.undo()
    assert "forward" not in vars(made.model)


def test_a_plan_survives_json_and_does_the_same(fitted: tuple[Training, Plan]) -> None:
    made, plan = fitted
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    again.apply(made.model)
    made.optimizer.zero_grad()
    torch.manual_seed(1)
    made.model(*made.inputs).backward()
    grads = [p.grad.clone() for p in made.model.parameters()]
    again.undo()
    made.optimizer.zero_grad()
    torch.manual_seed(1)
    made.model(*made.inputs).backward()
    assert_bitwise(grads, [p.grad for p in made.model.parameters()])


def test_a_plan_for_another_model_names_the_first_difference(fitted: tuple[Training, Plan]) -> None:
    _, plan = fitted
    other = training("resnet")
    with pytest.raises(PlanMismatch, match=r"words\.weight \[211, 64\]\n.*stem\.0\.weight \[16, 3, 7, 7\]"):
        plan.apply(other.model)
    assert "forward" not in vars(other.model)
    from fit_models import GPT

    with pytest.raises(PlanMismatch, match=r"blocks\.4\.norm1\.weight|head\.weight|norm\.weight"):
        plan.apply(GPT(blocks=5))


def test_a_copy_of_a_fitted_model_follows_the_plan_by_itself(fitted: tuple[Training, Plan]) -> None:
    made, plan = fitted
    plan.apply(made.model)
    twin = copy.deepcopy(made.model)
    plan.undo()
    assert vars(twin)["forward"]._forward.__self__ is twin
    torch.manual_seed(1)
    twin(*made.inputs).backward()
    grads = [p.grad for p in twin.parameters()]
    made.optimizer.zero_grad()
    torch.manual_seed(1)
    made.model(*made.inputs).backward()
    assert_bitwise(grads, [p.grad for p in made.model.parameters()])


def test_the_printed_plan_says_peaks_slowdown_regions_and_frontier(fitted: tuple[Training, Plan]) -> None:
    text = str(fitted[1])
    assert text.startswith("plan for 6.199 MiB: predicted peak ")
    assert "measured " in text
    assert "x the time" in text
    assert "operations again" in text
    assert "  budget     time" in text
    assert fitted[1]._repr_html_().startswith("<pre>plan for ")


def test_the_frontier_costs_more_time_for_less_memory(fitted: tuple[Training, Plan]) -> None:
    budgets = [budget for budget, _ in fitted[1].frontier]
    slowdowns = [slowdown for _, slowdown in fitted[1].frontier]
    assert budgets == sorted(budgets)
    assert slowdowns == sorted(slowdowns, reverse=True)
    assert slowdowns[-1] == 1.0


def test_without_scipy_the_search_is_greedy_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_solve.importlib.util, "find_spec", lambda name: None)
    made = training("gpt")
    plan = fit(made.model, made, memory=6_500_000)
    assert plan.measured_peak is not None
    assert plan.measured_peak <= 6_500_000
    assert any("without SciPy" in remark and "gradctl[fit]" in remark for remark in plan.remarks)
    assert_bitwise(outcome(made), outcome(training("gpt")))


def test_a_step_may_prove_its_plan_bitwise() -> None:
    made = training("gpt")
    plan = fit(made.model, made, memory=6_500_000, prove_steps=1)
    assert not plan.drops_nothing
    assert "forward" in vars(made.model)


def test_nothing_is_noted_while_gradients_are_off(
    fitted: tuple[Training, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plan = fitted
    noted: list[Any] = []
    run = Tape.run
    monkeypatch.setattr(Tape, "run", lambda tape, *call: noted.append(call) or run(tape, *call))
    plan.apply(made.model)
    try:
        with gradctl.off():
            torch.manual_seed(5)
            found = made.model(*made.inputs)
    finally:
        plan.undo()
    with torch.no_grad():
        torch.manual_seed(5)
        plain = made.model(*made.inputs)
    assert noted == []
    assert torch.equal(found, plain)
