"""What `gradctl.Step` refuses, with the sentence that says why."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradctl


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def told(error: pytest.ExceptionInfo[Any]) -> str:
    return error.value.headline


@pytest.mark.parametrize(
    ("options", "headline"),
    [
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": -2}, "accumulate=-2"),
        ({"accumulate": 2.0}, "accumulate=2.0"),
        ({"accumulate": True}, "accumulate=True"),
        ({"clip": 0}, "clip=0"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"clip": float("nan")}, "clip=nan"),
        ({"clip": ("value", 0.0)}, "clip=('value', 0.0)"),
        ({"clip": ("max", 1.0)}, "clip=('max', 1.0)"),
        ({"clip": "1"}, "clip='1'"),
        ({"items": "samples"}, "items='samples'"),
        ({"loss": "none"}, "loss='none'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore'"),
        ({"update": "before"}, "update='before'"),
        ({"scheduler": 3}, "scheduler=3"),
        ({"scheduler": [print]}, "scheduler=<built-in function print>"),
        ({"average": 3}, "average=3"),
        ({"precision": 16}, "precision=int"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_a_setting_that_means_nothing_is_named(options: dict[str, Any], headline: str) -> None:
    model = network()
    with pytest.raises(gradctl.UsageError) as error:
        gradctl.Step(model, sgd(model), **options)
    assert headline in told(error)


def test_a_clip_of_zero_says_what_it_would_do() -> None:
    model = network()
    with pytest.raises(gradctl.UsageError, match="0 would make every gradient zero, and a negative one would turn"):
        gradctl.Step(model, sgd(model), clip=0.0)


def test_a_grad_scaler_is_no_precision() -> None:
    model = network()
    with pytest.raises(gradctl.UsageError, match=r'precision=GradScaler\n(.*\n)*.*"fp16-scaled" in place of'):
        gradctl.Step(model, sgd(model), precision=torch.amp.GradScaler("cpu"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("policy", ["raise", "continue"])
def test_a_loss_scale_needs_skips(policy: Any) -> None:
    model = network()
    precision = gradctl.precision("fp16-scaled", allow_slow=True)
    with pytest.raises(gradctl.UsageError, match=rf'precision="fp16-scaled" with on_nonfinite="{policy}"'):
        gradctl.Step(model, sgd(model), precision=precision, on_nonfinite=policy)


def test_a_scaler_on_float16_parameters_is_refused() -> None:
    model = network().half()
    with pytest.raises(gradctl.PrecisionRefused, match=r"0\.weight is float16"):
        gradctl.Step(model, sgd(model), precision=gradctl.precision("fp16-scaled", allow_slow=True))


# -- optimizers, models, schedulers -----------------------------------------------------------------------------------


def test_an_optimizer_without_parameters_is_refused() -> None:
    model = network()
    optimizer = sgd(model)
    optimizer.param_groups[0]["params"].clear()
    with pytest.raises(gradctl.UsageError, match="SGD has no parameters"):
        gradctl.Step(model, optimizer)
    with pytest.raises(gradctl.UsageError, match="Step without an optimizer"):
        gradctl.Step(model, [])


def test_a_parameter_that_is_not_in_the_model_is_refused() -> None:
    model = network()
    optimizer = sgd(model)
    model[2] = nn.Linear(4, 5)
    with pytest.raises(gradctl.UsageError) as error:
        gradctl.Step(model, optimizer)
    assert told(error) == "parameter 2 of SGD, shape [2, 4], is not in the model"


def test_a_parameter_of_two_optimizers_is_refused() -> None:
    model = network()
    with pytest.raises(gradctl.UsageError) as error:
        gradctl.Step(model, [sgd(model), torch.optim.AdamW(model.parameters())])
    assert told(error) == "0.weight is in optimizer 0 (SGD) and in optimizer 1 (AdamW)"


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    model = network()
    with pytest.raises(gradctl.UsageError, match=r"Step\(int\)"):
        gradctl.Step(3, sgd(model))  # pyright: ignore[reportArgumentType]
    with pytest.raises(gradctl.UsageError, match="optimizer=3"):
        gradctl.Step(model, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(gradctl.UsageError, match="Linear is no optimizer"):
        gradctl.Step(model, [nn.Linear(1, 1)])  # pyright: ignore[reportArgumentType]


def test_lbfgs_keeps_its_own_order() -> None:
    model = network()
    with pytest.raises(gradctl.UsageError, match="LBFGS needs a closure"):
        gradctl.Step(model, torch.optim.LBFGS(model.parameters()))


def test_a_scheduler_of_another_optimizer_and_one_that_wants_a_metric_are_refused() -> None:
    model = network()
    optimizer, other = sgd(model), sgd(model)
    with pytest.raises(gradctl.UsageError, match="StepLR schedules another optimizer"):
        gradctl.Step(model, optimizer, scheduler=torch.optim.lr_scheduler.StepLR(other, 1))
    with pytest.raises(gradctl.UsageError, match=r"scheduler=ReduceLROnPlateau\n.*stepped with a metric"):
        gradctl.Step(model, optimizer, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def test_an_average_in_16_bits_would_stand_still() -> None:
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model).bfloat16()
    with pytest.raises(gradctl.UsageError, match=r"module\.0\.weight of the average is bfloat16"):
        gradctl.Step(model, sgd(model), average=average)


def test_complex_numbers_are_not_clipped_by_value() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(gradctl.UsageError, match="with complex parameters"):
        gradctl.Step(model, sgd(model), clip=("value", 1.0))


# -- unfinished -------------------------------------------------------------------------------------------------------


def half_a_step() -> tuple[Any, nn.Sequential]:
    model = network()
    step = gradctl.Step(model, sgd(model), accumulate=3)
    step.backward(model(torch.randn(2, 3)).mean())
    return step, model


def test_an_update_before_the_step_is_complete_is_refused() -> None:
    step, _ = half_a_step()
    with pytest.raises(gradctl.UnfinishedStep) as error:
        step.update()
    assert told(error) == "1 of 3 microbatches"
    step.flush()


def test_a_whole_step_in_the_middle_of_one_is_refused() -> None:
    step, model = half_a_step()
    for ask in (lambda: step([torch.randn(2, 3)], model), lambda: next(step.epoch([torch.randn(2, 3)], model))):
        with pytest.raises(gradctl.UnfinishedStep) as error:
            ask()
        assert told(error) == "1 of 3 microbatches are waiting"
    step.flush()


def test_one_microbatch_too_many_is_refused() -> None:
    model = network()
    step = gradctl.Step(model, sgd(model))
    loss = model(torch.randn(2, 3)).mean()
    step.backward(loss)
    for ask in (step.forward, lambda: step.backward(loss)):
        with pytest.raises(gradctl.UnfinishedStep) as error:
            ask()
        assert told(error) == "all 1 microbatches are there, and none was applied"
    step.update()


def test_leaving_with_microbatches_is_an_error_that_takes_everything_back() -> None:
    model = network()

    def leave() -> None:
        with gradctl.Step(model, sgd(model), accumulate=2, precision="bf16-stochastic") as step:
            assert model[0].weight.dtype is torch.bfloat16
            with step.forward():
                loss = model(torch.randn(2, 3)).mean()
            step.backward(loss)

    with pytest.raises(gradctl.UnfinishedStep) as error:
        leave()
    assert told(error) == "1 of 2 microbatches were never applied"
    assert model[0].weight.dtype is torch.float32


def test_an_error_inside_of_the_block_is_not_hidden() -> None:
    model = network()

    def fail() -> None:
        with gradctl.Step(model, sgd(model), accumulate=2) as step:
            step.backward(model(torch.randn(2, 3)).mean())
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_a_step_that_is_forgotten_with_microbatches_warns() -> None:
    def forget() -> nn.Sequential:
        step, model = half_a_step()
        del step
        gc.collect()
        return model

    with pytest.warns(UserWarning, match="1 of 3 microbatches were accumulated and never applied"):
        model = forget()
    assert model[0].weight.grad is not None


def test_a_program_that_ends_with_microbatches_says_so() -> None:
    code = (
        "import torch, gradctl\n"
        "model = torch.nn.Linear(2, 1)\n"
        "step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=3)\n"
        "step.backward(model(torch.randn(2, 2)).mean())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "1 of 3 microbatches were accumulated and never applied" in done.stderr


# -- microbatches and losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("microbatches", "headline"),
    [
        ([], "a step without microbatches"),
        ([1, 2, 3], "3 microbatches for a step that accumulates 2"),
        (torch.zeros(4, 3), "the microbatches are a Tensor"),
        ({"x": 1}, "the microbatches are a dict"),
        (3, "the microbatches are a int"),
        ((torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)), "a tuple of 2 tensors that differ in kind"),
    ],
)
def test_one_batch_is_not_taken_for_a_list_of_microbatches(microbatches: Any, headline: str) -> None:
    model = network()
    step = gradctl.Step(model, sgd(model), accumulate=2)
    with pytest.raises(gradctl.UsageError) as error:
        step(microbatches, lambda _: model(torch.zeros(4, 3)).mean())
    assert headline in told(error)


def refusal(loss_fn: Any, *, items: Any = None, accumulate: int = 4, **options: Any) -> str:
    model = network()
    step = gradctl.Step(model, sgd(model), accumulate=accumulate, **options)
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
    with pytest.raises(gradctl.UsageError) as error:
        step.backward(loss_fn(model(x), y), items=items)
    return told(error)


def test_a_loss_that_is_no_single_number_is_refused() -> None:
    assert refusal(lambda z, y: F.cross_entropy(z, y, reduction="none")) == "the loss has shape [6]"
    assert refusal(lambda z, y: 0.5) == "the loss is a float"


def test_a_mean_told_as_a_sum_and_a_sum_told_as_a_mean_are_refused() -> None:
    assert (
        refusal(F.cross_entropy, items=6, loss="sum") == 'the loss is a mean (NllLossBackward0) and loss="sum" was told'
    )
    assert (
        refusal(lambda z, y: z.mean(), items=6, loss="sum")
        == 'the loss is a mean (MeanBackward0) and loss="sum" was told'
    )
    assert (
        refusal(lambda z, y: F.cross_entropy(z, y, reduction="sum"), items=6)
        == 'the loss is a sum (NllLossBackward0) and loss="mean" was told'
    )


def test_a_loss_that_is_divided_by_hand_already_is_refused() -> None:
    headline = "the loss is divided by 4, and Step divides it again"
    assert refusal(lambda z, y: F.cross_entropy(z, y) / 4, items=6) == headline
    assert refusal(lambda z, y: F.cross_entropy(z, y) * 0.25, items=6) == headline
    assert refusal(lambda z, y: F.mse_loss(z[:, 0], y.float()) / 4, items=6) == headline


def test_a_loss_that_does_not_say_its_items_needs_them() -> None:
    headline = "microbatch 1 came without its number of items"
    assert refusal(lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean()) == headline
    assert refusal(lambda z, y: F.cross_entropy(z, y, reduction="sum"), loss="sum") == headline


@pytest.mark.parametrize("items", [-1, float("nan"), float("inf"), "many"])
def test_a_count_that_counts_nothing_is_refused(items: Any) -> None:
    shown = repr(items) if isinstance(items, str) else f"{items:g}"
    assert refusal(F.cross_entropy, items=items) == f"items={shown}"


def test_a_mean_over_nothing_that_counts_as_something_is_refused() -> None:
    assert (
        refusal(lambda z, y: F.cross_entropy(z, torch.full_like(y, -100)), items=6)
        == "microbatch 1 counts as 6 items, and its loss is a mean over 0"
    )


def test_rows_that_weigh_a_mean_over_tokens_are_refused() -> None:
    """The mean of means over tokens is up to half wrong, and its norm does not show it."""
    model = network()
    step = gradctl.Step(model, sgd(model), accumulate=2)
    for ignored, items in ((0, 6), (4, 6)):
        y = torch.randint(0, 2, (6,))
        y[:ignored] = -100
        loss = F.cross_entropy(model(torch.randn(6, 3)), y)
        if ignored:
            with pytest.raises(gradctl.UsageError) as error:
                step.backward(loss, items=items)
            assert told(error) == "microbatch 2 counts as 6 items, and its loss is a mean over 2"
        else:
            step.backward(loss, items=items)
    step.flush()


@pytest.mark.parametrize(
    ("rule", "batch", "headline"),
    [
        ("rows", ["text"], 'items="rows" and a microbatch without a tensor that has rows'),
        ("rows", {"x": torch.zeros(4, 3), "y": torch.zeros(5)}, 'items="rows" is ambiguous: x has 4, y has 5'),
        ("tokens", (torch.zeros(4, 3),), 'items="tokens" and no labels in the microbatch'),
        ("tokens", {"x": torch.zeros(4, 3)}, 'items="tokens" and no labels in the microbatch'),
        (lambda _: None, (torch.zeros(4, 3),), "items=None"),
    ],
)
def test_items_that_cannot_be_counted_are_refused(rule: Any, batch: Any, headline: str) -> None:
    model = network()
    step = gradctl.Step(model, sgd(model), items=rule)
    with pytest.raises(gradctl.UsageError) as error:
        step([batch], lambda _: model(torch.zeros(4, 3)).mean())
    assert told(error) == headline


# -- in the backward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"accumulate": 2}, "accumulate=2"),
        ({"clip": 1.0}, "clip"),
        ({"clip": ("value", 1.0)}, "clip"),
        ({"on_nonfinite": "skip"}, 'on_nonfinite="skip"'),
        ({"on_nonfinite": "raise"}, 'on_nonfinite="raise"'),
        ({"precision": "bf16-master"}, 'precision="bf16-master"'),
    ],
)
def test_an_update_in_the_backward_is_refused_where_it_needs_all_gradients(options: dict[str, Any], name: str) -> None:
    model = network()
    with pytest.raises(gradctl.UsageError) as error:
        gradctl.Step(model, sgd(model), update="in-backward", **{"on_nonfinite": "continue", **options})
    assert told(error) == f'update="in-backward" with {name}'


def test_an_optimizer_that_looks_at_all_parameters_does_not_step_in_the_backward() -> None:
    class Whole(torch.optim.SGD):
        pass

    model = network()
    with pytest.raises(gradctl.UsageError, match='update="in-backward" with Whole'):
        gradctl.Step(model, Whole(model.parameters(), lr=0.1), update="in-backward", on_nonfinite="continue")


@pytest.mark.parametrize(("options", "has"), [({"accumulate": 2}, "accumulate"), ({"clip": 1.0}, "clip")])
def test_torchs_optimizer_in_backward_is_refused_by_name(options: dict[str, Any], has: str) -> None:
    model = network()
    optimizer = sgd(model)
    model[2].bias._in_backward_optimizers = [optimizer]  # what torch.distributed.optim leaves there
    with pytest.raises(
        gradctl.UsageError, match=rf"^2\.bias is updated in the backward already(.*\n)*.*Step has {has}"
    ):
        gradctl.Step(model, optimizer, **options)


# -- states -----------------------------------------------------------------------------------------------------------


def test_a_state_that_does_not_fit_is_refused() -> None:
    step, _ = half_a_step()
    state = step.state_dict()
    step.flush()
    other = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(gradctl.UsageError, match="a state with accumulate=3 for a Step with accumulate=2"):
        gradctl.Step(other, sgd(other), accumulate=2).load_state_dict(state)
    with pytest.raises(gradctl.UsageError, match=re.escape("the state has a gradient of 0.weight, shape [4, 3]")):
        gradctl.Step(other, sgd(other), accumulate=3).load_state_dict(state)


def test_a_refused_step_has_changed_nothing() -> None:
    model = network()
    before = [(p.dtype, p.detach().clone()) for p in model.parameters()]
    with pytest.raises(gradctl.UsageError):
        gradctl.Step(model, sgd(model), precision="bf16-stochastic", scheduler=3)
    after: list[tuple[torch.dtype, Tensor]] = [(p.dtype, p.detach()) for p in model.parameters()]
    assert all(a[0] is b[0] and torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", ["bf16-autocast", "bf16-master", "bf16-stochastic"])
def test_a_backward_inside_of_forward_is_refused_before_it_runs(mode: Any) -> None:
    model = network()
    step = gradctl.Step(model, sgd(model), precision=mode)
    with step.forward():
        loss = model(torch.randn(5, 3)).square().mean()
        with pytest.raises(gradctl.UsageError) as error:
            step.backward(loss)
    assert told(error) == "step.backward() inside of step.forward()"
    step.backward(loss)
    assert not step.update().skipped


def test_a_backward_under_the_program_s_own_autocast_is_not_taken_for_one_inside_of_forward() -> None:
    model = network()
    step = gradctl.Step(model, sgd(model), precision="bf16-autocast")
    with torch.autocast("cpu", torch.bfloat16):  # as in Lightning, which runs all of training_step in it
        with step.forward():
            loss = model(torch.randn(5, 3)).square().mean()
        step.backward(loss)
    assert not step.update().skipped
