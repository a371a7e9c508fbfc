"""`gradctl.check` leaves everything as it found it, reaches what a function holds, and refuses what it cannot check."""

from __future__ import annotations

import functools
import random
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradctl


def test_random_states_are_where_they_were_and_dropout_has_one_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert gradctl.check(lambda x: model(x) * random.random() * np.random.rand(), x) == []
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_generator_that_a_function_holds_is_put_back() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert gradctl.check(lambda x: x * torch.rand(4, generator=generator), torch.randn(4)) == []
    assert torch.equal(before, generator.get_state())


def test_a_model_keeps_objects_values_gradients_buffers_flags_and_attributes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rnn = nn.BatchNorm1d(4), nn.LSTM(4, 3)
            self.register_buffer("count", torch.zeros((), dtype=torch.long))
            self.calls, self.scale, self.last = 0, torch.tensor(2.0), None
            self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.count += 1
            self.last = x
            return self.rnn(self.norm(x) * self.scale * self.frozen)[0]

    torch.manual_seed(0)
    model = Net()
    model.norm.eval()
    x = torch.randn(5, 4)
    model(x).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    objects = {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    grads = {k: (p.grad, p.grad.clone()) for k, p in model.named_parameters() if p.grad is not None}
    attributes = model.calls, id(model.scale), id(model.last), [m.training for m in model.modules()]
    assert gradctl.check(model, x) == []
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in model.state_dict().items())
    assert objects == {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    for k, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is grads[k][0]
            assert torch.equal(p.grad, grads[k][1])
    assert attributes == (model.calls, id(model.scale), id(model.last), [m.training for m in model.modules()])
    assert x.grad is None
    assert not x.requires_grad
    assert torch.get_default_dtype() == torch.float32


def test_everything_is_put_back_when_the_function_raises() -> None:
    model = nn.Linear(3, 2)
    weight, calls = model.weight, [0]

    def fn(x: Tensor) -> Tensor:
        calls[0] += 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gradctl.check(lambda x: fn(model(x)), torch.randn(1, 3))
    assert model.weight is weight
    assert weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_modules_and_leaves_that_a_function_refers_to_are_checked_by_name() -> None:
    torch.manual_seed(0)
    model, scale = nn.Linear(3, 2), torch.ones(2, requires_grad=True)
    detached = gradctl.check(lambda x: model(x) * scale.detach(), torch.randn(4, 3))
    assert [(f.slug, f.parameters) for f in detached] == [("none", ("scale",))]
    partial = functools.partial(lambda inner, x: F.linear(x, inner.weight.detach(), inner.bias), model)
    assert [(f.slug, f.parameters) for f in gradctl.check(partial, torch.randn(4, 3))] == [("none", ("weight",))]
    assert scale.dtype == torch.float32

    class Trainer:
        def __init__(self) -> None:
            self.model = nn.Linear(3, 2)

        def loss(self, x: Tensor) -> Tensor:
            return self.model(x).square().mean() + self.model.bias.detach().sum() ** 2

    (finding,) = gradctl.check(Trainer().loss, torch.randn(4, 3))
    assert finding.parameters == ("bias",)


def test_the_functional_use_of_a_weight_is_checked() -> None:
    model = nn.Linear(3, 2)
    assert gradctl.check(lambda x: F.linear(x, model.weight) + model(x), torch.randn(4, 3)) == []


def test_tied_weights_are_one_tensor() -> None:
    table, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = table.weight
    (finding,) = gradctl.check(
        lambda words: head(table(words).detach()), torch.tensor([[1, 2]]), params={"tied": table.weight}
    )
    assert finding.parameters == ("tied",)


def test_a_hook_on_a_parameter_counts_and_is_told() -> None:
    model = nn.Linear(3, 2)
    model.weight.register_hook(lambda g: 0.5 * g)
    (finding,) = gradctl.check(model, torch.randn(4, 3))
    assert (finding.slug, finding.parameters) == ("factor", ("weight",))
    assert "weight has gradient hooks, which count here" in finding.why


def test_parameters_can_be_chosen_by_pattern_mapping_and_module() -> None:
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, (self.weight + self.weight.detach()) / 2, self.bias)

    model = nn.Sequential(Halved(3, 4), nn.Tanh(), Halved(4, 2))
    x = torch.randn(5, 3)
    for params, names in (
        (None, ("0.weight", "2.weight")),
        (["2.*"], ("2.weight",)),
        ({"mine": model[0].weight}, ("mine",)),
        (model[2], ("2.weight",)),
        ([model[2].weight], ("2.weight",)),
        ((), ()),
    ):
        assert tuple(n for f in gradctl.check(model, x, params) for n in f.parameters) == names
    with pytest.raises(gradctl.PatternMatchesNothing, match=r"2\.wieght"):
        gradctl.check(model, x, ["2.wieght"])
    assert gradctl.check(model, x, expected=["*.weight"]) == []
    with pytest.raises(gradctl.PatternMatchesNothing):
        gradctl.check(model, x, expected=["nothing"])


def test_only_inputs_that_require_a_gradient_are_checked_when_there_are_any() -> None:
    p, y = torch.rand(4), torch.rand(4)
    assert gradctl.check(lambda p, y: F.binary_cross_entropy(p.sigmoid(), y), (p.clone().requires_grad_(), y)) == []
    with pytest.raises(gradctl.UsageError, match="torch has no derivative by 'weight' at all"):
        gradctl.check(lambda p, y: F.nll_loss(p.log_softmax(0)[None], torch.tensor([1]), weight=y), (p, y))


def test_nested_inputs_and_outputs_keywords_and_integers_are_followed() -> None:
    def fn(batch: dict[str, Any], *, scale: Tensor) -> dict[str, Any]:
        return {
            "loss": (batch["x"] * scale).sum(),
            "parts": (batch["pair"][1].detach() * scale, 3),
            "ids": batch["ids"],
        }

    x, pair, ids = torch.randn(3), (torch.randn(3), torch.randn(3)), torch.arange(3)
    findings = gradctl.check(fn, {"batch": {"x": x, "pair": pair, "ids": ids}, "scale": torch.ones(3)})
    assert [(f.slug, f.parameters) for f in findings] == [("none", ("batch['pair'][1]",))]


def test_a_forward_that_differs_from_run_to_run_is_told_and_nothing_is_compared() -> None:
    state = [1.0]

    def fn(x: Tensor) -> Tensor:
        state[0] *= 1.01
        return x * state[0]

    (finding,) = gradctl.check(fn, torch.randn(3))
    assert (finding.slug, finding.severity) == ("non-determinism", "error")
    assert "two forwards from the same random states differ by 0.0" in finding.symptom
    assert "nothing was compared" in finding.symptom


def test_a_leaf_that_cannot_be_reached_is_remarked() -> None:
    class Hidden:
        __slots__ = ("w",)

    hidden = Hidden()
    hidden.w = torch.ones(3, requires_grad=True)
    findings = gradctl.check(lambda x: x * hidden.w, torch.randn(3))
    assert findings == []
    assert any("were not checked (shapes [3])" in remark for remark in findings.remarks)


class OnlySingle(torch.autograd.Function):
    """Takes float32 and half types only, as a kernel might."""

    wrong = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("not implemented for 'Double'")
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos() * (1.1 if OnlySingle.wrong else 1.0)


def test_a_function_that_takes_no_float64_is_compared_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(20)
    findings = gradctl.check(lambda x: OnlySingle.apply(x), x)
    assert findings == []
    assert any("compared in float32" in remark for remark in findings.remarks)
    monkeypatch.setattr(OnlySingle, "wrong", True)
    (finding,) = gradctl.check(lambda x: OnlySingle.apply(x), x)
    assert finding.parameters == ("x",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_raised_to_float64_and_refused_where_that_fails(dtype: torch.dtype) -> None:
    model, x = nn.Linear(3, 2).to(dtype), torch.randn(4, 3).to(dtype)
    assert gradctl.check(model, x) == []
    assert model.weight.dtype == dtype
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(gradctl.UsageError, match=f"a derivative cannot be checked in {name}"):
        gradctl.check(lambda x: OnlySingle.apply(x), x)


class DistributedDataParallel(nn.Module):
    """Stands for the wrapper of that name, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(2, 2))


def reentrant(x: Tensor) -> Tensor:
    return checkpoint(torch.sin, x, use_reentrant=True)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: gradctl.check(torch.ones(2), ()), "check() was given a Tensor"),
        (lambda: gradctl.check(torch.sin, torch.ones(2), order=3), "order=3"),
        (lambda: gradctl.check(torch.sin, torch.ones(2), probes=0), "probes=0"),
        (lambda: gradctl.check(lambda x: x + 1, torch.arange(3)), "there is nothing to check"),
        (lambda: gradctl.check(lambda x: x.sum().item(), torch.ones(3)), "the function returns no floating tensor"),
        (lambda: gradctl.check(torch.log, -torch.ones(3)), "an output is NaN or infinite at this point"),
        (lambda: gradctl.check(nn.LazyLinear(3), torch.ones(2, 2)), "weight of LazyLinear has no shape yet"),
        (lambda: gradctl.check(nn.Linear(2, 2, device="meta"), torch.ones(2, 2)), "is on the meta device"),
        (
            lambda: gradctl.check(DistributedDataParallel(nn.Linear(2, 2)), torch.ones(2)),
            "DistributedDataParallel cannot be",
        ),
        (lambda: gradctl.check(nn.Linear(2, 2), torch.ones(2), params=3), "params is a int"),
        (lambda: gradctl.check(scripted(), torch.ones(2)), "is a scripted module"),
        (lambda: gradctl.check(reentrant, torch.ones(2)), "a reentrant checkpoint cannot be checked"),
        (lambda: gradctl.check(nn.Linear(2, 2), torch.ones(2), {"w": torch.ones(2)}), "w of params is not found"),
        (lambda: gradctl.check(nn.Linear(2, 2), torch.ones(2), {"w": 3}), "params['w'] is no floating tensor"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(gradctl.UsageError, match=re.escape(sentence)) as raised:
        call()
    assert raised.value.fix


def test_inference_mode_is_refused_and_no_grad_is_not_in_the_way() -> None:
    with torch.inference_mode(), pytest.raises(gradctl.UsageError, match="inference_mode"):
        gradctl.check(torch.sin, torch.ones(2))
    with torch.no_grad():
        assert gradctl.check(torch.sin, torch.ones(2)) == []
        assert not torch.is_grad_enabled()


def test_sparse_buffers_and_constants_are_raised_as_well() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(4).to_sparse())
            self.body, self.mask = nn.Linear(3, 3), [torch.ones(3), torch.zeros(3)]

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.adjacency, self.body(x)) * self.mask[0] + F.linear(x, torch.ones(3, 3))

    model = Graph()
    before = model.adjacency
    assert gradctl.check(model, torch.randn(4, 3)) == []
    assert model.adjacency is before
    assert before.dtype == torch.float32
