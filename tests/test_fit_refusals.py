"""`gradctl.fit` and its plans, given what they cannot use: refused with a sentence, and nothing stays changed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fit_models import Training, training
from gradctl._errors import BudgetTooSmall, UsageError
from gradctl._fit import Plan, PlanNotFollowed, fit


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    made = training("gpt")
    plan = fit(made.model, made, memory=6_500_000)
    plan.undo()
    return plan.to_json()


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (0, "memory=0 is no budget"),
        ("0GiB", "memory='0GiB' is no budget"),
        (-1, "'?-1'? is not a size"),
        ("plenty", "'plenty' is not a size"),
        ("8 gibi", "is not a size"),
        (True, "is not a"),
    ],
)
def test_what_is_no_budget_is_refused(memory: Any, said: str) -> None:
    made = training("gpt")
    with pytest.raises(UsageError, match=said):
        fit(made.model, made, memory=memory)
    assert "forward" not in vars(made.model)


def test_a_budget_above_what_is_used_needs_nothing_and_says_so() -> None:
    made = training("gpt")
    plan = fit(made.model, made, memory="1GiB")
    assert plan.drops_nothing
    assert "the plain program fits: nothing is dropped" in str(plan)
    assert "forward" not in vars(made.model)


def test_a_budget_that_is_too_small_carries_the_smallest_through_pickle() -> None:
    made = training("gpt")
    with pytest.raises(BudgetTooSmall, match=r"the smallest budget that works is .* bytes\)") as caught:
        fit(made.model, made, memory="1MiB")
    assert caught.value.smallest > 1 << 20
    assert pickle.loads(pickle.dumps(caught.value)).smallest == caught.value.smallest
    assert "forward" not in vars(made.model)


def test_a_lever_that_is_none_is_refused() -> None:
    made = training("gpt")
    with pytest.raises(UsageError, match="'magic' is no lever"):
        fit(made.model, made, memory="1GiB", levers=["magic"])  # type: ignore[list-item]


@pytest.mark.parametrize("returned", [None, 3.0, torch.zeros(2)])
def test_a_step_that_returns_no_loss_is_refused(returned: Any) -> None:
    made = training("gpt")

    def step() -> Any:
        made()
        return returned

    with pytest.raises(UsageError, match=r"the step returned .*, not a loss|loss, a tensor of one number"):
        fit(made.model, step, memory="1GiB")


def test_a_step_that_never_calls_the_model_is_refused() -> None:
    made, other = training("gpt"), training("gpt")
    with pytest.raises(UsageError, match="the step never called this GPT with gradients on"):
        fit(made.model, other, memory="1GiB")


@pytest.mark.parametrize("where", ["before", "forward", "backward", "after"])
def test_a_step_that_raises_midway_leaves_everything_as_it_was(where: str) -> None:
    made, other = training("resnet"), training("resnet")
    inner = made.model.blocks[3]

    def broken(*_: Any) -> None:
        raise KeyError("midway")

    def step() -> torch.Tensor:
        if where == "before":
            broken()
        made.optimizer.zero_grad()
        handles = [inner.register_forward_hook(broken)] if where == "forward" else []
        try:
            loss = made.model(*made.inputs)
            if where == "backward":
                loss.register_hook(broken)
            loss.backward()
            made.optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        if where == "after":
            broken()
        return loss

    torch.manual_seed(7)
    with pytest.raises(KeyError, match="midway"):
        fit(made.model, step, memory="1GiB", optimizer=made.optimizer)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(state, torch.get_rng_state())
    assert "forward" not in vars(made.model)
    assert not inner._forward_hooks
    for name, value in other.model.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], value), name
    for p, q in zip(made.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        for key, value in other.optimizer.state[q].items():
            assert torch.equal(made.optimizer.state[p][key], value)


def test_modules_that_change_mode_in_the_step_are_put_back() -> None:
    made = training("gpt")

    def step() -> torch.Tensor:
        made.model.eval()
        made.model.blocks[0].train()
        return made()

    fit(made.model, step, memory="1GiB")
    assert all(module.training for module in made.model.modules())


def test_another_shape_keeps_everything_names_the_region_and_has_right_gradients() -> None:
    made = training("gpt")
    plan = fit(made.model, made, memory=6_500_000)
    model, (words, targets) = made.model, made.inputs

    class Longer(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.first = first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) * 1.5

    model.blocks[1] = Longer(model.blocks[1])  # what a plan cannot know: the model itself was changed
    torch.manual_seed(2)
    made.optimizer.zero_grad()
    with pytest.warns(PlanNotFollowed, match=r"from operation \d+ on \(segment \d+, expected aten"):
        model(words[:, :32], targets[:, :32]).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    plan.undo()
    torch.manual_seed(2)
    made.optimizer.zero_grad()
    model(words[:, :32], targets[:, :32]).backward()
    for grad, p in zip(grads, model.parameters(), strict=True):
        assert torch.equal(grad, p.grad)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schema", "gradctl.plan/9", "schema is 'gradctl.plan/9'"),
        ("budget", "much", "no plan of gradctl"),
        ("verify", "maybe", "'maybe' is not one of"),
        ("calls", [{}], "no plan of gradctl"),
        ("calls", 3, "no plan of gradctl"),
        ("model", [["a"]], "no plan of gradctl"),
        ("regions", None, "no plan of gradctl"),
    ],
)
def test_a_malformed_plan_is_refused(written: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Plan.from_json({**written, key: value})


@pytest.mark.parametrize("data", [None, 3, [], {}, "plan"])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(UsageError, match=r"no plan of gradctl|schema"):
        Plan.from_json(data)


def test_a_plan_whose_operations_were_changed_by_hand_is_refused(written: dict[str, Any]) -> None:
    data = json.loads(json.dumps(written))
    data["calls"][0]["drop"].pop()
    with pytest.raises(UsageError, match="changed by hand"):
        Plan.from_json(data)


@pytest.mark.parametrize("name", ["os.system('true')", "aten", "aten.mm", "__import__.os.system", "aten.mm.default;x"])
def test_nothing_in_a_plan_is_executed(written: dict[str, Any], name: str) -> None:
    data = json.loads(json.dumps(written))
    data["calls"][0]["functions"][0] = name
    with pytest.raises(UsageError):
        Plan.from_json(data)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(UsageError, match="cannot be read as a plan"):
        Plan.load(path)
    path.write_bytes(b"\x80\x04K\x03.")
    with pytest.raises(UsageError, match="cannot be read as a plan"):
        Plan.load(path)


def test_a_plan_is_applied_once(written: dict[str, Any]) -> None:
    made = training("gpt")
    plan = Plan.from_json(written).apply(made.model)
    with pytest.raises(UsageError, match="follows a plan already"):
        plan.apply(made.model)
    plan.undo()
    assert "forward" not in vars(made.model)


def test_a_step_under_a_profiler_is_refused(no_optimizers_of_other_tests: None) -> None:
    made: Training = training("gpt")
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(UsageError, match="while a profiler is running"),
    ):
        fit(made.model, made, memory="1GiB")
    assert "forward" not in vars(made.model)
