"""What happens in a step, and in which order: scale, unscale, clip, skip, schedule, average, resume."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradctl

MODES = [None, "fp32", "bf16-autocast", "bf16-master", "bf16-stochastic", "bf16-kahan"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count: int, rows: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 6, generator=generator), torch.randint(0, 4, (rows,), generator=generator))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def scaled(**options: Any) -> Any:
    return gradctl.precision("fp16-scaled", allow_slow=True, **options)


class Loud(nn.Module):
    """A weight whose gradient is whatever the data say, also NaN and inf."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


# -- loss scale -------------------------------------------------------------------------------------------------------


def test_a_scaled_step_is_bitwise_the_loop_with_a_grad_scaler() -> None:
    data = batches(8)
    by_hand, by_step = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    scales = []
    for batch in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(by_hand, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    optimizer = torch.optim.SGD(by_step.parameters(), lr=0.1, momentum=0.9)
    step = gradctl.Step(by_step, optimizer, precision=scaled(init_scale=2.0**20, growth_interval=3))
    found = [step.loss_scale for _ in step.epoch(data, lambda batch: loss_of(by_step, batch))]
    assert found == scales
    assert len(set(scales)) > 1
    assert same(weights(by_hand), weights(by_step))


def test_a_scaled_step_is_clipped_in_unscaled_units() -> None:
    model = Loud()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = gradctl.Step(model, optimizer, precision=scaled(init_scale=1024.0), clip=1.0)
    result = step([torch.tensor([3.0, 4.0])], model)
    assert (result.grad_norm, result.scale) == (pytest.approx(5.0), 1024.0)
    torch.testing.assert_close(1 - model.weight.detach(), torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-6)


def test_one_overflow_skips_all_optimizers_and_halves_the_scale_once() -> None:
    a, b = Loud(), Loud()
    optimizers = [torch.optim.SGD(a.parameters(), lr=1.0), torch.optim.SGD(b.parameters(), lr=1.0)]
    step = gradctl.Step([a, b], optimizers, precision=scaled(init_scale=1024.0))
    bad, good = torch.tensor([math.inf, 1.0]), torch.tensor([1.0, 1.0])
    result = step([good], lambda x: a(bad) + b(x))
    assert result.skipped
    assert (result.scale, step.loss_scale) == (1024.0, 512.0)
    assert same(weights(a) + weights(b), [torch.ones(2), torch.ones(2)])
    assert not step([good], lambda x: a(x) + b(x)).skipped
    assert same(weights(a), [torch.zeros(2)])


# -- NaN and inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0, ("value", 1.0)])
def test_a_bad_gradient_skips_optimizer_schedule_and_average(bad: float, clip: Any) -> None:
    model = Loud()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    average = torch.optim.swa_utils.AveragedModel(model)
    step = gradctl.Step(model, optimizer, scheduler=scheduler, average=average, clip=clip, on_nonfinite="skip")
    assert step([torch.tensor([bad, 1.0])], model).skipped
    assert same(weights(model), [torch.ones(2)])
    assert (scheduler.last_epoch, int(average.n_averaged), len(optimizer.state)) == (0, 0, 0)
    assert model.weight.grad is not None  # to look at, until the next step
    assert not step([torch.ones(2)], model).skipped
    assert (scheduler.last_epoch, int(average.n_averaged), len(optimizer.state)) == (1, 1, 1)


def test_raise_names_the_parameter_and_keeps_gradients_to_look_at() -> None:
    model = nn.ModuleDict({"fine": Loud(), "odd": Loud()})
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1.0), on_nonfinite="raise")
    with pytest.raises(gradctl.NonFiniteGradient, match=r"^the gradient of odd\.weight is NaN or inf"):
        step([torch.tensor([math.nan, 1.0])], lambda x: model["odd"](x) + model["fine"](torch.ones(2)))
    assert model["odd"].weight.grad is not None
    assert same(weights(model), [torch.ones(2)] * 2)
    assert not step([torch.ones(2)], lambda x: model["odd"](x)).skipped


def test_continue_goes_on_with_what_is_there() -> None:
    model = Loud()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1.0), on_nonfinite="continue", clip=1.0)
    assert not step([torch.tensor([math.inf, 0.5])], model).skipped
    assert model.weight.tolist() == [-math.inf, 0.5]  # torch's clipping would have made the other one stand still


def test_a_norm_that_overflows_float32_is_no_bad_gradient() -> None:
    model = Loud()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1.0), clip=1.0)
    result = step([torch.tensor([3e25, 4e25])], model)
    assert not result.skipped
    assert result.grad_norm == pytest.approx(5e25)
    torch.testing.assert_close(1 - model.weight.detach(), torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "skipped"), [({}, False), ({"clip": 1.0}, True), ({"clip": math.inf}, True)])
def test_unasked_a_bad_gradient_is_looked_for_where_a_norm_is_measured(options: Any, skipped: bool) -> None:
    model = Loud()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1.0), **options)
    assert step([torch.tensor([math.nan, 1.0])], model).skipped is skipped
    assert bool(torch.isfinite(model.weight).all()) is skipped  # as a plain loop would


def test_fifty_skips_in_a_row_are_an_error() -> None:
    model = Loud()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1.0), on_nonfinite="skip")
    for _ in range(49):
        assert step([torch.tensor([math.nan, 1.0])], model).skipped
    with pytest.raises(gradctl.NonFiniteGradient, match="50 steps in a row were skipped"):
        step([torch.tensor([math.nan, 1.0])], model)


# -- schedules and averages -------------------------------------------------------------------------------------------


def test_a_schedule_moves_once_a_step_and_not_once_a_microbatch() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))]
    step = gradctl.Step(model, optimizer, accumulate=4, scheduler=schedules)
    assert len(list(step.epoch(batches(10), lambda batch: loss_of(model, batch)))) == 3
    assert schedules[0].last_epoch == 3


def test_an_average_may_be_a_function_of_the_model() -> None:
    model = network()
    seen: list[Any] = []
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), average=seen.append)
    step(batches(1), lambda batch: loss_of(model, batch))
    assert seen == [model]


# -- results ----------------------------------------------------------------------------------------------------------


def test_a_result_says_what_the_step_did() -> None:
    model = network()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2, clip=100.0)
    result = step(batches(2), lambda batch: loss_of(model, batch))
    assert repr(result).startswith(f"StepResult(loss={result.loss:.4g}, grad_norm={result.grad_norm:.4g}, items=8")
    assert (result.microbatches, result.scale, result.clipped, result.skipped) == (2, 1.0, False, False)


def test_the_16_bit_stall_is_named_once() -> None:
    model = network().to(torch.bfloat16)
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    data = [(x.bfloat16(), y) for x, y in batches(10)]
    with pytest.warns(UserWarning, match=r"the bf16 stall: .*0\.weight.*bf16-master") as told:
        list(step.epoch(data, lambda batch: loss_of(model, batch)))
    assert len(told) == 1


@pytest.mark.parametrize("mode", MODES)
def test_no_stall_is_told_where_there_is_none(mode: Any) -> None:
    model = network()
    with (
        warnings.catch_warnings(record=True) as told,
        gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=1e-6), precision=mode) as step,
    ):
        warnings.simplefilter("always")
        list(step.epoch(batches(6), lambda batch: loss_of(model, batch)))
    assert told == []


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, "fp16-scaled"])
@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_a_run_resumed_in_the_middle_of_a_step_is_bitwise_the_uninterrupted_one(mode: Any, stop: int) -> None:
    data = [part for rows in (4, 2, 0, 5) for part in batches(2, rows, seed=rows)]
    precision = scaled(growth_interval=2) if mode == "fp16-scaled" else mode

    def build() -> tuple[nn.Module, Any, Any, Any]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = gradctl.Step(
            model, optimizer, accumulate=3, precision=precision, clip=1.0, scheduler=scheduler, items="rows"
        )
        return model, optimizer, scheduler, step

    def run(model: nn.Module, step: Any, parts: list[Any]) -> list[Any]:
        results = []
        for part in parts:
            with step.forward():
                loss = loss_of(model, part)
            step.backward(loss, items=len(part[0]))
            if step.ready:
                results.append(step.update())
        return results

    model, _, _, step = build()
    told = run(model, step, data)
    told.append(step.flush())
    first_model, first_optimizer, first_scheduler, first_step = build()
    run(first_model, first_step, data[:stop])
    saved = copy.deepcopy([each.state_dict() for each in (first_model, first_optimizer, first_scheduler, first_step)])
    first_step.flush()
    second_model, second_optimizer, second_scheduler, second_step = build()
    for each, state in zip((second_model, second_optimizer, second_scheduler, second_step), saved, strict=True):
        each.load_state_dict(state)
    resumed = run(second_model, second_step, data[stop:])
    resumed.append(second_step.flush())
    assert [repr(result) for result in told[-len(resumed) :]] == [repr(result) for result in resumed]
    assert same(weights(model), weights(second_model))
    assert step.loss_scale == second_step.loss_scale


def test_a_saved_step_survives_torch_save(tmp_path: Any) -> None:
    model = network()
    step = gradctl.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2)
    step.backward(loss_of(model, batches(1)[0]))
    torch.save(step.state_dict(), tmp_path / "step.pt")
    state = torch.load(tmp_path / "step.pt", weights_only=True)
    step.flush()
    step.load_state_dict(state)
    assert not step.ready
    assert model[0].weight.grad is not None
    step.flush()


# -- in the backward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_update_in_the_backward_is_bitwise_the_one_after_it(kind: Any) -> None:
    data = batches(6)
    after, during = network(), network()
    outcomes = []
    for model, how in ((after, {}), (during, {"update": "in-backward", "on_nonfinite": "continue"})):
        bias = [p for name, p in model.named_parameters() if "bias" in name]
        rest = [p for name, p in model.named_parameters() if "bias" not in name]
        optimizer = kind([{"params": rest}, {"params": bias, "lr": 0.001}], lr=0.01, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        with gradctl.Step(model, optimizer, scheduler=scheduler, **how) as step:
            outcomes.append([result.loss for result in step.epoch(data, lambda batch, m=model: loss_of(m, batch))])
    assert outcomes[0] == outcomes[1]
    assert same(weights(after), weights(during))


def test_an_update_in_the_backward_never_holds_all_gradients() -> None:
    model = network()
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradctl.Step(model, optimizer, update="in-backward", on_nonfinite="continue") as step:
        handles = [p.register_post_accumulate_grad_hook(count) for p in model.parameters()]
        step(batches(1), lambda batch: loss_of(model, batch))
        for handle in handles:
            handle.remove()
    assert most == 0
