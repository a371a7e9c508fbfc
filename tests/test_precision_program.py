"""The program around a precision stays a program: its state, its optimizers, its own edits of weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradctl

SIXTEEN = ("bf16-master", "bf16-kahan", "bf16-stochastic")
ALL = ("fp32", "bf16-autocast", "fp16-scaled", *SIXTEEN)


def described(mode: Any, **given: Any) -> Any:
    return gradctl.precision(mode, allow_slow=mode == "fp16-scaled", **given)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 8, generator=generator), torch.randint(0, 3, (12,), generator=generator)


def step(model: nn.Module, optimizer: Any, attached: Any, seed: int) -> None:
    x, y = batch(seed)
    attached.zero_grad()
    with attached.forward():
        loss = cross_entropy(model(x), y)
    attached.scale(loss).backward()
    attached.collect()
    attached.unscale()
    attached.step(optimizer)
    attached.update(False)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", ALL)
def test_parameters_groups_and_states_stay_the_objects_that_they_were(mode: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.01, momentum=0.9
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    with described(mode).attach(model, optimizer) as attached:
        for seed in range(3):
            step(model, optimizer, attached, seed)
            schedule.step()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == before
    assert [id(p) for p in model.parameters()] == [each for group in before for each in group]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * 0.125, 0.01 * 0.125]
    assert set(map(id, optimizer.state)) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("mode", ["fp32", "bf16-autocast", "fp16-scaled", "bf16-master"])
def test_state_dicts_are_those_of_the_plain_program_and_load_both_ways(mode: Any) -> None:
    model, plain = network(), network()
    optimizer, other = adam(model), adam(plain)
    x, y = batch(0)
    cross_entropy(plain(x), y).backward()
    other.step()
    with described(mode).attach(model, optimizer) as attached:
        with attached.forward():  # a forward without a backward: the copies are in place when the state is asked for
            model(x)
        model.load_state_dict(plain.state_dict())
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
        assert same(values(model), values(plain)), "all bits of float32 were taken"
        step(model, optimizer, attached, 1)
        with attached.forward():
            model(x)
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert {v.dtype for v in kept[0].values()} == {torch.float32}
    assert {v.dtype for s in kept[1]["state"].values() for v in s.values()} == {torch.float32}
    plain.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    assert same(values(model), values(plain))
    x, y = batch(2)
    other.zero_grad()
    cross_entropy(plain(x), y).backward()
    other.step()


@pytest.mark.parametrize("mode", SIXTEEN)
def test_loading_an_optimizer_keeps_its_states_in_float32(mode: Any) -> None:
    """torch casts a loaded state to the dtype of the weight, which is bfloat16 here: that would round the moments."""
    model = network()
    optimizer = adam(model)
    with described(mode).attach(model, optimizer) as attached:
        step(model, optimizer, attached, 0)
        kept = copy.deepcopy(optimizer.state_dict())
        step(model, optimizer, attached, 1)
        optimizer.load_state_dict(copy.deepcopy(kept))
        for index, state in enumerate(optimizer.state.values()):
            for key, value in state.items():
                assert value.dtype is torch.float32
                assert torch.equal(value, kept["state"][index][key])


@pytest.mark.parametrize("mode", ALL)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(mode: Any) -> None:
    def begin() -> tuple[nn.Module, Any, Any]:
        model = network()
        optimizer = adam(model)
        return model, optimizer, described(mode).attach(model, optimizer)

    model, optimizer, attached = begin()
    for seed in range(3):
        step(model, optimizer, attached, seed)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), attached.state_dict()))
    for seed in range(3, 6):
        step(model, optimizer, attached, seed)
    resumed, other, again = begin()
    step(resumed, other, again, 99)
    resumed.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    again.load_state_dict(kept[2])
    for seed in range(3, 6):
        step(resumed, other, again, seed)
    assert same(values(resumed), values(model))
    attached.remove()
    again.remove()
    assert same(values(resumed), values(model)), "what rounding took off as well"


@pytest.mark.parametrize("mode", SIXTEEN)
def test_a_bare_optimizer_step_is_right_too(mode: Any) -> None:
    found = []
    for bare in (False, True):
        model = network()
        optimizer = adam(model)
        with described(mode).attach(model, optimizer) as attached:
            for seed in range(3):
                x, y = batch(seed)
                optimizer.zero_grad()
                with attached.forward():
                    loss = cross_entropy(model(x), y)
                loss.backward()
                if bare:
                    optimizer.step()
                else:
                    attached.collect()
                    attached.step(optimizer)
        found.append(values(model))
    assert same(*found)


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda model: [p.clamp_(-0.05, 0.05) for p in model.parameters()],
    "through data": lambda model: [p.data.clamp_(-0.05, 0.05) for p in model.parameters()],
    "other data": lambda model: [setattr(p, "data", p.data.clamp(-0.05, 0.05)) for p in model.parameters()],
    "initialised": lambda model: [nn.init.zeros_(p) for p in model.parameters()],
}


TIMES = ("between steps", "between forward and backward")
# While the copies are in place, what is written to them through `.data` leaves no trace: said on the page.
UNSEEN = ("bf16-master", "through data", TIMES[1])


@pytest.mark.parametrize(
    ("mode", "how", "when"), [case for case in itertools.product(SIXTEEN, EDITS, TIMES) if case != UNSEEN]
)
def test_weights_that_the_program_changes_stay_changed(mode: Any, how: str, when: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with described(mode).attach(model, optimizer) as attached:
        step(model, optimizer, attached, 0)
        with torch.no_grad():
            if when == TIMES[1]:
                with attached.forward():
                    model(batch(0)[0])
            EDITS[how](model)
        step(model, optimizer, attached, 1)
        limit = 0.0 if how == "initialised" else 0.05
        for p in values(model):
            assert float(p.abs().max()) <= limit + 2.0**-9 * limit + 1e-40


@pytest.mark.parametrize("mode", SIXTEEN)
def test_parameters_that_come_later_and_frozen_ones_are_handled(mode: Any) -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)  # model[0].bias trains in no optimizer
    with described(mode).attach(model, optimizer) as attached:
        model.append(nn.Linear(3, 3))
        optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.2})
        head = values(model[3])
        step(model, optimizer, attached, 0)
        assert not same(values(model[3]), head)
        assert len(attached.gradients()) == len(attached.stepped()) == 4
        assert model[0].bias.grad is not None
    assert torch.equal(model[0].weight, frozen), "all bits"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", SIXTEEN)
def test_a_bfloat16_model_comes_with_its_dtype_and_leaves_with_it(mode: Any) -> None:
    model = network().bfloat16()
    optimizer = adam(model)
    x, y = batch(0)
    cross_entropy(model(x.bfloat16()).float(), y).backward()
    optimizer.step()  # its states are bfloat16
    with described(mode).attach(model, optimizer) as attached:
        for seed in range(2):
            step(model, optimizer, attached, seed)
        states = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        assert {v.dtype for v in states} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.dtype is torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("mode", ALL)
def test_remove_takes_everything_back_and_the_model_can_be_attached_again(mode: Any) -> None:
    model = network()
    optimizer = adam(model)
    for _ in range(2):
        attached = described(mode, **({} if mode == "fp32" else {"overrides": {"2": "fp32"}})).attach(model, optimizer)
        with attached.forward():
            model(batch(0)[0])
        attached.remove()
        attached.remove()
    wanted = [p.bfloat16().float() if mode == "bf16-stochastic" else p for p in values(network())]
    assert same(values(model)[:2], wanted[:2])
    assert same(values(model)[2:], values(network())[2:]), "kept in float32"
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._state_dict_pre_hooks
        assert not module._load_state_dict_pre_hooks
    for hooks in ("step_pre", "step_post", "load_state_dict_pre", "load_state_dict_post"):
        assert not getattr(optimizer, f"_optimizer_{hooks}_hooks")
    x, y = batch(0)
    cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("mode", SIXTEEN)
def test_an_optimizer_that_raises_in_its_step_leaves_16_bit_weights(mode: Any) -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ArithmeticError("no")

    model = network()
    optimizer = Fails(model.parameters(), lr=0.1)
    with described(mode).attach(model, optimizer) as attached:
        before = values(model)
        with pytest.raises(ArithmeticError):
            attached.step(optimizer)
        assert same(values(model), before)


@pytest.mark.parametrize("mode", ALL)
def test_the_programs_random_numbers_are_not_touched(mode: Any) -> None:
    model = network()
    optimizer = adam(model)
    before = torch.get_rng_state()
    with described(mode).attach(model, optimizer) as attached:
        for seed in range(2):
            step(model, optimizer, attached, seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_seed_gives_one_run_and_another_seed_another() -> None:
    found = []
    for seed in (0, 0, 1):
        model = network()
        optimizer = adam(model)
        with described("bf16-stochastic", seed=seed).attach(model, optimizer) as attached:
            for number in range(3):
                step(model, optimizer, attached, number)
        found.append(values(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("mode", SIXTEEN)
def test_a_copy_of_the_model_is_a_model_of_its_own(mode: Any) -> None:
    model = network()
    optimizer = adam(model)
    with described(mode, overrides={"2": "fp32"}).attach(model, optimizer) as attached:
        average = torch.optim.swa_utils.AveragedModel(model)
        step(model, optimizer, attached, 0)
        average.update_parameters(model)
        with attached.forward(), torch.no_grad():
            ours, theirs = model(batch(3)[0]), average(batch(3)[0])
        attached.collect()
        assert torch.allclose(ours, theirs, atol=2e-2)
        assert same(values(average.module), values(model))


def test_a_removed_precision_refuses_a_forward() -> None:
    model = network()
    attached = described("bf16-autocast").attach(model)
    attached.remove()
    with pytest.raises(gradctl.UsageError, match="was removed"):
        attached.forward()
