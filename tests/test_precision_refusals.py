"""What a precision refuses, in which words, and that nothing was changed then."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import gradctl


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def attach(mode: Any, model: nn.Module, *optimizers: Any, **given: Any) -> None:
    gradctl.precision(mode, **given).attach(model, *optimizers).remove()


def two_optimizers() -> None:
    model = network()
    attach("bf16-kahan", model, sgd(model), torch.optim.SGD([model[1].bias], lr=0.1))


def given_twice() -> None:
    model = network()
    optimizer = sgd(model)
    attach("fp32", model, optimizer, optimizer)


def empty() -> None:
    model = network()
    optimizer = sgd(model)
    optimizer.param_groups[0]["params"] = []
    attach("bf16-autocast", model, optimizer)


def not_in_the_model() -> None:
    model = network()
    attach("fp32", copy.deepcopy(model), sgd(model))


def partly_on_meta() -> None:
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here, self.there = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")

    attach("bf16-autocast", Elsewhere())


def complex_numbers() -> None:
    model = network()
    model[1].weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.complex64))
    attach("bf16-master", model, sgd(model))


def attached_twice() -> None:
    model = network()
    with gradctl.precision("bf16-autocast").attach(model):
        attach("bf16-master", model, sgd(model))


def attached_below() -> None:
    model = network()
    with gradctl.precision("bf16-autocast").attach(model[0]):
        attach("bf16-autocast", model)


def wrapped_by(name: str) -> None:
    wrapper = type(name, (nn.Module,), {"__module__": "torch.nn.parallel.distributed"})()
    wrapper.module = network()
    attach("bf16-master", wrapper, sgd(wrapper))


def lbfgs() -> None:
    model = network()
    attach("bf16-master", model, torch.optim.LBFGS(model.parameters()))


def with_dtype(mode: Any, dtype: torch.dtype, **given: Any) -> Callable[[], None]:
    def refused() -> None:
        model = network(dtype)
        attach(mode, model, sgd(model), **given)

    return refused


def on_a_cpu() -> None:
    model = network()
    attach("fp16-scaled", model, sgd(model))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "two optimizers": (two_optimizers, "1.bias is in two optimizers"),
    "given twice": (given_twice, "the same optimizer is given twice"),
    "empty": (empty, "SGD has no parameters"),
    "not in the model": (not_in_the_model, "parameter 0 of SGD, [4, 4], is not in the model"),
    "meta": (partly_on_meta, "there.weight is on the meta device"),
    "attached": (attached_twice, "Sequential already has precision 'bf16-autocast'"),
    "attached below": (attached_below, "Linear already has precision 'bf16-autocast'"),
    "DDP": (lambda: wrapped_by("DistributedDataParallel"), "the model is wrapped by DistributedDataParallel"),
    "DP": (lambda: wrapped_by("DataParallel"), "the model is wrapped by DataParallel"),
    "LBFGS": (lbfgs, "precision 'bf16-master' with LBFGS"),
    "no optimizer": (lambda: attach("bf16-kahan", network()), "precision 'bf16-kahan' without an optimizer"),
    "scaler on fp16": (with_dtype("fp16-scaled", torch.float16, allow_slow=True), "0.weight is float16"),
    "fp16": (with_dtype("bf16-stochastic", torch.float16), "0.weight is float16"),
    "autocast over bf16": (with_dtype("bf16-autocast", torch.bfloat16), "0.weight is bfloat16"),
    "float64": (with_dtype("bf16-master", torch.float64), "0.weight is float64"),
    "complex": (complex_numbers, "1.weight is complex64"),
    "CPU": (on_a_cpu, "precision 'fp16-scaled' on a CPU"),
    "nothing": (lambda: attach("bf16-autocast", nn.ReLU()), "the model has no parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_a_sentence_that_names_the_offender(case: str) -> None:
    refused, headline = REFUSED[case]
    with pytest.raises(gradctl.PrecisionRefused) as caught:
        refused()
    assert caught.value.headline == headline
    assert caught.value.fix is not None or caught.value.what is not None


def test_two_kinds_of_device_are_named() -> None:
    from gradctl._precision._refusals import _one_kind_of_device

    class OnAnother:
        device = torch.device("cuda")

    with pytest.raises(gradctl.PrecisionRefused) as caught:
        _one_kind_of_device({"a": nn.Parameter(torch.zeros(1)), "b": OnAnother()})  # pyright: ignore
    assert caught.value.headline == "b is on cuda, a on cpu"


def test_a_refusal_changes_nothing() -> None:
    model = network()
    model[1].double()
    optimizer = sgd(model)
    before = {name: (id(p), p.dtype, p.grad_dtype) for name, p in model.named_parameters()}
    with pytest.raises(gradctl.PrecisionRefused):
        attach("bf16-master", model, optimizer)
    with pytest.raises(gradctl.PatternMatchesNothing, match="heed"):
        attach("bf16-autocast", model, optimizer, overrides={"heed.*": "fp32"})
    assert {name: (id(p), p.dtype, p.grad_dtype) for name, p in model.named_parameters()} == before
    assert not model._state_dict_pre_hooks
    attach("bf16-autocast", model, optimizer)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "bf16"}, "mode='bf16'"),
    "init_scale": ({"mode": "bf16-autocast", "init_scale": 2.0}, "init_scale with precision 'bf16-autocast'"),
    "seed": ({"mode": "bf16-kahan", "seed": 1}, "seed with precision 'bf16-kahan'"),
    "allow_slow": ({"mode": "bf16-master", "allow_slow": True}, "allow_slow with precision 'bf16-master'"),
    "overrides": ({"mode": "fp32", "overrides": {"a": "fp32"}}, "overrides with precision 'fp32'"),
    "kind": ({"mode": "bf16-master", "overrides": {"a": "fp16"}}, "overrides: 'a' to 'fp16'"),
    "growth": ({"mode": "fp16-scaled", "growth_factor": 1.0}, "growth_factor=1.0"),
    "backoff": ({"mode": "fp16-scaled", "backoff_factor": 1.0}, "backoff_factor=1.0"),
    "interval": ({"mode": "fp16-scaled", "growth_interval": 0}, "growth_interval=0"),
    "scale": ({"mode": "fp16-scaled", "init_scale": 0.0}, "init_scale=0.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_without_a_meaning_is_refused(case: str) -> None:
    given, headline = WRONG[case]
    with pytest.raises(gradctl.UsageError) as caught:
        gradctl.precision(**given)
    assert caught.value.headline == headline


def test_what_follows_the_model_must_be_optimizers() -> None:
    model = network()
    with pytest.raises(gradctl.UsageError, match=r"attach\(\.\.\., list\)"):
        attach("fp32", model, [sgd(model)])
    with pytest.raises(gradctl.UsageError, match=r"attach\(list\)"):
        gradctl.precision("fp32").attach([model])  # pyright: ignore[reportArgumentType]


def test_a_state_of_another_mode_or_model_is_refused() -> None:
    model = network()
    optimizer = sgd(model)
    with gradctl.precision("bf16-kahan").attach(model, optimizer) as attached:
        kept = attached.state_dict()
        with pytest.raises(gradctl.UsageError, match="a state of precision 'fp32' for 'bf16-kahan'"):
            attached.load_state_dict({"mode": "fp32"})
        kept["remainders"]["1.weight"] = torch.zeros(3, dtype=torch.int16)
        with pytest.raises(gradctl.UsageError, match=r"the state does not fit: 1\.weight"):
            attached.load_state_dict(kept)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("mode", "first"),  # attached first, torch itself refuses the gradients of weights that are kept in 16 bits
    [("bf16-master", "attach"), ("bf16-master", "wrap"), ("bf16-kahan", "wrap"), ("bf16-stochastic", "wrap")],
)
def test_a_wrapper_that_would_not_hear_the_gradients_is_seen_in_the_forward(mode: Any, first: str) -> None:
    """Two ranks drift apart without a word otherwise: the reducer waits for weights that the forward does not use."""
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model) if first == "wrap" else model
    with gradctl.precision(mode).attach(model, sgd(model)) as attached:
        with attached.forward():
            model(torch.randn(3, 4))  # by itself it is no wrapped model
        attached.collect()
        if first == "attach":
            wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(gradctl.PrecisionRefused) as caught, attached.forward():
            wrapped(torch.randn(3, 4))
        assert caught.value.headline == "the model is wrapped by DistributedDataParallel"
    assert not model._forward_pre_hooks
