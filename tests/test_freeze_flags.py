"""Frozen parameters stand still under every optimizer, and everything is put back exactly, in any order."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradctl
import settled
from gradctl import FreezeRefused, PatternMatchesNothing, UsageError, _taps

settled.compiling()


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def values(model: nn.Module, part: str = "") -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name.startswith(part)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def backward(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(8, 3, generator=generator)).square().mean().backward()


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, weight_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clearing", ["none", "zeros", "never", "filled"])
def test_no_optimizer_moves_what_is_frozen_nor_its_state(kind: str, clearing: str) -> None:
    model = Net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    weights = [model.encoder[0].weight, model.encoder[2].bias]
    state = [copy.deepcopy(optimizer.state[weight]) for weight in weights]
    before, head = values(model, "encoder"), values(model, "head")
    with gradctl.freeze(model, "encoder.*", optimizer=optimizer):  # the gradients of the last step are still there
        for seed in range(3, 6):
            if clearing in ("none", "zeros"):
                optimizer.zero_grad(set_to_none=clearing == "none")
            backward(model, seed)
            if clearing == "filled":
                for parameter in model.parameters():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        assert same(values(model, "encoder"), before)
        for weight, old in zip(weights, state, strict=True):
            new = optimizer.state[weight]
            assert new.keys() == old.keys()
            assert all(torch.equal(torch.as_tensor(new[key]), torch.as_tensor(old[key])) for key in old)
    assert not same(values(model, "head"), head)
    optimizer.zero_grad()
    backward(model, 6)
    optimizer.step()
    assert not same(values(model, "encoder"), before)


def test_a_zeroed_gradient_does_not_freeze() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    backward(model)
    optimizer.step()
    before = values(model, "encoder")
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert not same(values(model, "encoder"), before)


def test_training_with_a_frozen_encoder_is_bitwise_that_of_a_model_whose_optimizer_never_had_it() -> None:
    ours, oracle = Net(), Net()
    frozen = gradctl.freeze(ours, "encoder.*")
    mine = torch.optim.AdamW(ours.parameters(), lr=0.1)
    theirs = torch.optim.AdamW(oracle.head.parameters(), lr=0.1)
    for seed in range(5):
        for model, optimizer in ((ours, mine), (oracle, theirs)):
            model.zero_grad()
            backward(model, seed)
            optimizer.step()
    assert same(values(ours), values(oracle))
    frozen.remove()


def test_a_call_freezes_at_once_and_remove_puts_back_what_was_there() -> None:
    model = Net()
    model.encoder[2].bias.requires_grad_(False)
    before = flags(model)
    frozen = gradctl.freeze(model, "encoder")
    assert flags(model) == {name: name.startswith("head") for name in before}
    assert frozen.names == ("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias")
    frozen.remove()
    frozen.remove()
    assert flags(model) == before
    assert frozen.names == ()
    assert _taps.installed() == []


def test_with_puts_back_at_the_end_also_after_an_error_and_can_be_entered_again() -> None:
    model = Net()
    before = flags(model)
    frozen = gradctl.freeze(model, "head")
    with pytest.raises(ZeroDivisionError), frozen, frozen:
        raise ZeroDivisionError
    assert flags(model) == before
    with frozen as again:
        assert again is frozen
        with frozen:
            assert not model.head.weight.requires_grad
        assert not model.head.weight.requires_grad
    assert flags(model) == before


def test_a_decorated_function_freezes_while_it_runs_and_at_no_other_time() -> None:
    model = Net()
    before = flags(model)

    @gradctl.freeze(model, "encoder.*")
    def trained(depth: int = 1) -> list[str]:
        """Say what trains."""
        if depth:
            trained(depth - 1)
        return [name for name, flag in flags(model).items() if flag]

    assert flags(model) == before
    assert trained() == ["head.weight", "head.bias"]
    assert (trained.__name__, trained.__doc__) == ("trained", "Say what trains.")
    assert flags(model) == before

    @gradctl.freeze(model, "encoder.*")
    async def later() -> bool:
        await asyncio.sleep(0)
        return model.encoder[0].weight.requires_grad

    @gradctl.freeze(model, "encoder.*")
    def items() -> Iterator[bool]:
        yield model.encoder[0].weight.requires_grad
        yield model.encoder[0].weight.requires_grad

    assert asyncio.run(later()) is False
    assert list(items()) == [False, False]
    assert flags(model) == before


def test_what_cannot_be_decorated_is_refused_and_the_handle_stays_as_it_is() -> None:
    model = Net()
    frozen = gradctl.freeze(model, "head")
    with pytest.raises(UsageError, match="it decorates functions, coroutines and generators"):
        frozen(Net)
    assert not model.head.weight.requires_grad
    frozen.remove()


PATTERNS = ("encoder.*", "encoder.0", "*.bias", "head.weight", "!head.bias")


@given(st.lists(st.tuples(st.sampled_from(PATTERNS), st.booleans(), st.integers(0, 99)), min_size=1, max_size=5))
def test_overlapping_calls_are_undone_exactly_in_any_order(calls: list[tuple[str, bool, int]]) -> None:
    model = Net()
    model.encoder[0].bias.requires_grad_(False)
    before = flags(model)
    live: list[tuple[Any, tuple[str, ...], bool, int]] = []
    for pattern, trains, rank in calls:
        if trains:
            handle = gradctl.unfreeze(model, pattern)
        else:
            handle = gradctl.freeze(model, pattern, nothing_left="allow")
        live.append((handle, handle.names, trains, rank))
    while True:
        expected = dict(before)
        for _, names, trains, _ in live:  # the later call counts
            expected |= dict.fromkeys(names, trains)
        assert flags(model) == expected
        if not live:
            break
        first = min(live, key=lambda entry: entry[-1])
        live.remove(first)
        first[0].remove()
    assert _taps.installed() == []


def test_who_sets_the_flag_in_between_wins_and_ends_the_freezes_of_that_parameter() -> None:
    model = Net()
    model.head.bias.requires_grad_(False)
    first = gradctl.freeze(model, "encoder.*")
    model.encoder[0].weight.requires_grad_(True)
    second = gradctl.freeze(model, "encoder.0.weight")
    assert not model.encoder[0].weight.requires_grad
    first.remove()
    assert flags(model) == {
        "encoder.0.weight": False,
        "encoder.0.bias": True,
        "encoder.2.weight": True,
        "encoder.2.bias": True,
        "head.weight": True,
        "head.bias": False,
    }
    second.remove()
    assert model.encoder[0].weight.requires_grad
    third = gradctl.unfreeze(model, "head.bias")
    model.head.bias.requires_grad_(False)
    third.remove()
    assert not model.head.bias.requires_grad


def test_a_gradient_that_nobody_used_is_given_back() -> None:
    model = Net()
    backward(model)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with gradctl.freeze(model, nothing_left="allow"):  # as a generator while the discriminator trains
        assert all(parameter.grad is None for parameter in model.parameters())
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("by", ["step", "zero_grad", "model.zero_grad"])
def test_a_gradient_that_was_used_or_cleared_meanwhile_does_not_come_back(by: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    with gradctl.freeze(model, "encoder.*"):
        {"step": optimizer.step, "zero_grad": optimizer.zero_grad, "model.zero_grad": model.zero_grad}[by]()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


def test_a_backward_of_a_graph_from_before_leaves_no_gradient() -> None:
    model = Net()
    loss = model(torch.ones(2, 3)).sum()
    with gradctl.freeze(model, "encoder.*"):
        loss.backward()
        assert model.encoder[0].weight.grad is None
        assert model.head.weight.grad is not None


def test_gradients_pass_through_what_is_frozen() -> None:
    model = Net()
    x = torch.ones(2, 3, requires_grad=True)
    with gradctl.freeze(model, "head"):
        model(x).sum().backward()
    assert x.grad is not None
    assert model.encoder[0].weight.grad is not None


def test_lbfgs_is_refused_at_the_call_and_at_its_step_before_it_moves_anything() -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    with pytest.raises(FreezeRefused, match="LBFGS would move what is frozen"):
        gradctl.freeze(model, "encoder.*", optimizer=optimizer)
    assert all(flags(model).values())
    before = values(model)
    with (
        gradctl.freeze(model, "encoder.*"),
        pytest.raises(FreezeRefused, match=r"LBFGS would move a parameter of shape \[4, 3\], frozen by freeze"),
    ):
        optimizer.step(lambda: model(torch.ones(1, 3)).sum())
    assert same(values(model), before)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda m: gradctl.freeze(m, "encodr.*"), PatternMatchesNothing, r"'encodr.\*' matches no parameter"),
        (lambda m: gradctl.freeze(m, Net().head.weight), PatternMatchesNothing, "that is not in the model"),
        (lambda m: gradctl.unfreeze(m, "haed"), PatternMatchesNothing, "did you mean 'head'"),
        (lambda m: gradctl.freeze(m), FreezeRefused, "this freezes all of Net"),
        (lambda m: gradctl.freeze(m, "*"), FreezeRefused, 'mean it: nothing_left="allow"'),
        (lambda m: gradctl.freeze(m, "head", "!head"), UsageError, "nothing is left of what the patterns choose"),
        (lambda m: gradctl.freeze(nn.ReLU()), UsageError, "it has no parameters"),
        (lambda m: gradctl.freeze(m.parameters(), "x"), UsageError, "freeze of a generator"),
        (lambda m: gradctl.freeze("encoder.*"), UsageError, "freeze of a str"),
        (lambda m: gradctl.freeze(m, "head", optimizer=3), UsageError, "optimizer=int"),
        (lambda m: gradctl.freeze(m, "head", dropout="on"), UsageError, "dropout='on'"),
        (lambda m: gradctl.freeze(m, "head", nothing_left="yes"), UsageError, "nothing_left='yes'"),
    ],
)
def test_bad_input_has_its_sentence_and_nothing_is_changed(
    call: Callable[[nn.Module], Any], error: type[Exception], sentence: str
) -> None:
    model = Net()
    with pytest.raises(error, match=sentence):
        call(model)
    assert all(flags(model).values())
    assert _taps.installed() == []


def test_a_parameter_that_the_optimizer_does_not_hold_is_named() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(FreezeRefused, match=r"encoder.0.weight and 3 more: not in SGD"):
        gradctl.freeze(model, "encoder.*", optimizer=optimizer)
    with pytest.raises(FreezeRefused, match="they would get gradients and never move"):
        gradctl.unfreeze(model, "encoder.0", optimizer=[optimizer])
    both = [optimizer, torch.optim.SGD(model.encoder.parameters(), lr=0.1)]
    gradctl.freeze(model, "encoder", optimizer=both).remove()


def test_unfreezing_integers_is_refused_by_name() -> None:
    model = Net()
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(FreezeRefused, match=r"codes is torch.int8"):
        gradctl.unfreeze(model)
    gradctl.unfreeze(model, "!codes").remove()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.wte.weight


@pytest.mark.parametrize("call", [gradctl.freeze, gradctl.unfreeze])
def test_a_tied_parameter_named_by_one_name_only_is_refused_with_both(call: Any) -> None:
    model = Tied()
    with pytest.raises(FreezeRefused) as caught:
        call(model, "wte")
    assert caught.value.headline == "wte.weight is tied to lm_head.weight"
    assert caught.value.fix == 'name both: add "lm_head.weight"; or neither: add "!wte.weight"'
    with call(model, "wte", "lm_head") as handle:
        assert handle.names == ("wte.weight", "lm_head.weight")
        assert model.wte.weight.requires_grad is (call is gradctl.unfreeze)
    assert model.wte.weight.requires_grad


def test_a_copy_and_a_pickled_frozen_model_are_frozen_as_it_was_and_nobodys() -> None:
    model = Net()
    frozen = gradctl.freeze(model, "encoder.*")
    expected = flags(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    frozen.remove()
    assert all(flags(model).values())
    for twin in twins:
        assert flags(twin) == expected
        gradctl.unfreeze(twin).remove()
        assert flags(twin) == expected


def test_a_forgotten_freeze_stays_and_keeps_nothing_alive() -> None:
    model = Net()
    gradctl.freeze(model, "encoder.*")
    gc.collect()
    assert not model.encoder[0].weight.requires_grad
    dead = [weakref.ref(model), weakref.ref(model.encoder[0])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    del model, optimizer
    assert [ref() for ref in dead] == [None, None]
    assert _taps.installed() == []


def test_a_compiled_model_follows_its_flags_under_the_names_of_the_model_inside() -> None:
    model = Net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.ones(2, 3)
    compiled(x).sum().backward()
    with gradctl.freeze(compiled, "encoder.*") as frozen:
        assert frozen.names[0] == "encoder.0.weight"
        model.zero_grad()
        compiled(x).sum().backward()
        assert model.encoder[0].weight.grad is None
        assert model.head.weight.grad is not None
    compiled(x).sum().backward()
    assert model.encoder[0].weight.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it compiles an optimizer
def test_a_compiled_step_passes_over_what_is_frozen() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="aot_eager")
    backward(model)
    step()
    before = values(model, "encoder")
    with gradctl.freeze(model, "encoder.*"):
        backward(model)
        step()
        assert same(values(model, "encoder"), before)


def test_a_scaled_step_passes_over_what_is_frozen() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = values(model, "encoder")
    with gradctl.freeze(model, "encoder.*", optimizer=optimizer):
        scaler.scale(model(torch.ones(2, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert same(values(model, "encoder"), before)


def test_the_handle_says_what_it_is() -> None:
    model = Net()
    frozen = gradctl.freeze(model, "encoder.*", lambda name, value: name == "head.bias")
    line = test_the_handle_says_what_it_is.__code__.co_firstlineno + 2
    assert repr(frozen) == f"<freeze('encoder.*', <lambda>) at tests/test_freeze_flags.py:{line}: 5 parameters>"
    frozen.remove()
    assert repr(frozen).endswith(": removed>")
