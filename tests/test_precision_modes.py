"""What each mode computes and steps, held against the same thing written by hand in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import gradctl
import settled

settled.compiling()

MASTERS = ("bf16-master", "bf16-kahan")
SIXTEEN = (*MASTERS, "bf16-stochastic")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def data(rows: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 16, generator=generator), torch.randint(0, 4, (rows,), generator=generator)


def train(model: nn.Module, optimizer: Any, attached: Any, *, steps: int = 4, microbatches: int = 3) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        attached.zero_grad()
        for part, target in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
            with attached.forward():
                loss = cross_entropy(model(part), target) / microbatches
            attached.scale(loss).backward()
            attached.collect()
            losses.append(loss.item())
        attached.step(optimizer)
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


def masters_by_hand(make: Callable[[Any], Any], *, steps: int = 4, microbatches: int = 3) -> list[Tensor]:
    """Float32 masters as people write them: a bfloat16 model beside them, gradients added up in float32."""
    model = network().bfloat16()
    masters = [p.detach().clone().requires_grad_() for p in network().parameters()]
    optimizer = make(masters)
    x, y = data()
    for _ in range(steps):
        for master in masters:
            master.grad = torch.zeros_like(master)
        for part, target in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters, strict=True):
                    p.copy_(master)
            loss = cross_entropy(model(part.bfloat16()).float(), target) / microbatches
            for master, gradient in zip(masters, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                master.grad += gradient.float()
        optimizer.step()
    return [master.detach() for master in masters]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("mode", MASTERS)
def test_masters_are_those_written_by_hand_bit_by_bit_with_any_optimizer(mode: Any, kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    with gradctl.precision(mode).attach(model, optimizer) as attached:
        train(model, optimizer, attached)
    assert same(weights(model), masters_by_hand(OPTIMIZERS[kind]))


def test_fp32_and_autocast_are_plain_loops_bit_by_bit() -> None:
    for mode, dtype in (("fp32", None), ("bf16-autocast", torch.bfloat16)):
        model, plain = network(), network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with gradctl.precision(mode).attach(model, optimizer) as attached:  # pyright: ignore[reportArgumentType]
            train(model, optimizer, attached)
        other = torch.optim.AdamW(plain.parameters(), lr=1e-3)
        x, y = data()
        for _ in range(4):
            other.zero_grad()
            for part, target in zip(x.chunk(3), y.chunk(3), strict=True):
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = cross_entropy(plain(part), target) / 3
                loss.backward()
            other.step()
        assert same(weights(model), weights(plain))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_stochastic_weights_are_bfloat16_between_steps_and_their_states_float32(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    with gradctl.precision("bf16-stochastic").attach(model, optimizer) as attached:
        losses = train(model, optimizer, attached)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        assert {v.dtype for v in states} <= {torch.float32}
        assert all(g.dtype is torch.float32 for g in attached.gradients())
    assert losses[-1] < losses[2], "the same rows"
    by_hand = masters_by_hand(OPTIMIZERS[kind])
    for ours, theirs in zip(weights(model), by_hand, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 2.0**-7


@pytest.mark.parametrize("mode", SIXTEEN)
def test_a_step_below_half_an_ulp_is_not_lost(mode: Any) -> None:
    """The stall: plain bfloat16 does not move at all in 64 steps of a sixteenth of an ulp each."""

    def trained(step: Callable[[nn.Module, Any], None], model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(64):
            for p in model.parameters():
                p.grad = torch.full_like(p, -(2.0**-11), dtype=p.grad_dtype)
            step(model, optimizer)
        return next(model.parameters()).detach()

    def ones() -> nn.Module:
        model = nn.Linear(64, 64, bias=False)
        nn.init.ones_(model.weight)
        return model

    plain = trained(lambda _, optimizer: optimizer.step(), ones().bfloat16())
    assert bool((plain == 1.0).all())
    model = ones()
    with gradctl.precision(mode).attach(model, optimizer := torch.optim.SGD(model.parameters(), lr=1.0)) as attached:
        for _ in range(64):
            for p in model.parameters():
                p.grad = torch.full_like(p, -(2.0**-11), dtype=torch.float32)
            attached.step(optimizer)
    moved = model.weight.detach().double()
    if mode == "bf16-stochastic":
        assert abs(moved.mean().item() - (1 + 2.0**-5)) < 5 * 2.0**-7 * (64 * 1 / 16) ** 0.5 / 64
    else:
        assert bool((moved == 1 + 2.0**-5).all())


def test_microbatches_of_one_row_add_up_in_float32() -> None:
    """Section by section sums of bfloat16 gradients are 35 % off; these are as good as one big bfloat16 batch."""
    x, y = data(256)
    exact = copy.deepcopy(network()).double()
    cross_entropy(exact(x.double()), y).backward()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])

    def error(parameters: Any) -> float:
        found = torch.cat([p.grad.flatten().double() for p in parameters])
        return float((found - wanted).norm() / wanted.norm())

    for mode in SIXTEEN:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradctl.precision(mode).attach(model, optimizer) as attached:  # pyright: ignore[reportArgumentType]
            for row, target in zip(x.split(1), y.split(1), strict=True):
                with attached.forward():
                    loss = cross_entropy(model(row), target) / 256
                loss.backward()
                attached.collect()
            assert error(attached.stepped()) < 0.01
    plain = network().bfloat16()
    for row, target in zip(x.split(1), y.split(1), strict=True):
        (cross_entropy(plain(row.bfloat16()).float(), target) / 256).backward()
    assert error(plain.parameters()) > 0.02


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 4)
        self.seen: list[torch.dtype] = []

    def block(self, x: Tensor) -> Tensor:
        self.seen.append(self.inner.weight.dtype)
        return nn.functional.gelu(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.block, x, use_reentrant=False))


@pytest.mark.parametrize("mode", SIXTEEN)
def test_a_recompute_in_the_backward_sees_the_weights_of_the_forward(mode: Any) -> None:
    torch.manual_seed(0)
    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data()
    with gradctl.precision(mode).attach(model, optimizer) as attached:
        for _ in range(2):
            with attached.forward():
                loss = cross_entropy(model(x), y)
            loss.backward()
            attached.collect()
            attached.step(optimizer)
    assert model.seen == [torch.bfloat16] * 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(tokens))[0])


@pytest.mark.parametrize("mode", ["bf16-autocast", *SIXTEEN])
def test_tied_weights_and_recurrent_layers_train(mode: Any) -> None:
    torch.manual_seed(0)
    model = Tied()
    tokens = torch.randint(0, 20, (4, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with gradctl.precision(mode).attach(model, optimizer) as attached:
        for _ in range(15):
            attached.zero_grad()
            with attached.forward():
                loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            attached.collect()
            attached.step(optimizer)
            losses.append(loss.item())
        assert model.head.weight is model.table.weight
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("mode", SIXTEEN)
def test_a_sparse_gradient_is_stepped_in_float32(mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(30, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.01)
    with gradctl.precision(mode).attach(model, optimizer) as attached:
        start = model.weight.detach().clone()
        with attached.forward():
            loss = model(torch.tensor([[3, 3, 5]])).square().sum()
        loss.backward()
        attached.collect()
        assert model.weight.grad is not None
        assert model.weight.grad.is_sparse
        assert attached.gradients()[0].dtype is torch.float32
        attached.step(optimizer)
        moved = (model.weight - start).detach().abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("mode", SIXTEEN)
def test_statistics_and_normalisation_weights_stay_float32(mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(56, 4), nn.LayerNorm(4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data()
    dtypes: dict[str, Any] = {}
    model[5].register_forward_pre_hook(lambda *_: dtypes.update({n: p.dtype for n, p in model.named_parameters()}))
    with gradctl.precision(mode).attach(model, optimizer) as attached:
        with attached.forward():
            loss = cross_entropy(model(x.unsqueeze(1)).float(), y)
        loss.backward()
        attached.collect()
        attached.step(optimizer)
        assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}
    assert {name for name, dtype in dtypes.items() if dtype is torch.bfloat16} == {
        "0.weight", "0.bias", "4.weight", "4.bias"
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["bf16-autocast", *SIXTEEN])
def test_an_override_keeps_a_module_and_its_inputs_in_float32(mode: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data()
    seen: list[Any] = []
    with gradctl.precision(mode, overrides={"4.*": "fp32", "0": "fp32"}).attach(model, optimizer) as attached:
        for number in (0, 2, 4):
            model[number].register_forward_hook(
                lambda module, args, output: seen.append((module.weight.dtype, output.dtype))
            )
        with attached.forward():
            out = model(x)
            assert torch.is_autocast_enabled("cpu")
        cross_entropy(out, y).backward()
        attached.collect()
        attached.step(optimizer)
    middle = torch.float32 if mode == "bf16-autocast" else torch.bfloat16
    assert seen == [(torch.float32,) * 2, (middle, torch.bfloat16), (torch.float32,) * 2]
    hooks = [m for m in model.modules() if m._forward_pre_hooks]
    assert hooks == []


def test_an_override_that_raises_leaves_autocast_as_it_was() -> None:
    model = network()
    with gradctl.precision("bf16-autocast", overrides={"4": "fp32"}).attach(model) as attached:
        with attached.forward():
            with pytest.raises(RuntimeError, match="mat1"):
                model(torch.randn(3, 5))
            with pytest.raises(RuntimeError, match="mat1"):
                model[4](torch.randn(3, 5))
            assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cpu")


@pytest.fixture
def compiling() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("mode", ["bf16-autocast", "bf16-master", "bf16-stochastic"])
@pytest.mark.parametrize("first", ["attach", "compile"])
def test_a_compiled_model_is_compiled_once_and_computes_the_same(mode: Any, first: str) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[int] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(1)
        return aot_eager(graph, examples)

    found = []
    for compiled in (False, True):
        model = network()
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled and first == "compile" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradctl.precision(mode, overrides={"4": "fp32"}).attach(run, optimizer) as attached:
            if compiled and first == "attach":
                run = torch.compile(model, backend=backend, fullgraph=True)
            train(run, optimizer, attached)
        found.append(weights(model))
    assert len(graphs) == 1
    assert all(torch.allclose(a, b, rtol=0.0, atol=2e-3) for a, b in zip(*found, strict=True))
