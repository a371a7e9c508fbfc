"""A traced program computes what it computes untraced, whatever it does, and nothing of the trace stays behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradctl
from gradctl._explain import Sentinel, Tracing
from starting import environment

pytestmark = pytest.mark.usefixtures("no_optimizers_of_other_tests")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def classifier() -> list[Tensor]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    out: list[Tensor] = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(12, 6)), torch.randint(0, 3, (12,)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        out.append(loss.detach())
    return [*out, *(p.detach() for p in model.parameters())]


def lbfgs() -> list[Tensor]:
    model = nn.Linear(4, 1)
    x, y = torch.randn(30, 4), torch.randn(30, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        return loss

    losses = [torch.tensor(float(torch.as_tensor(optimizer.step(closure)).detach())) for _ in range(4)]
    return [*losses, *(p.detach() for p in model.parameters())]


def transforms() -> list[Tensor]:
    def energy(w: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x @ w).sum()

    w, x = torch.randn(4), torch.randn(5, 4)
    return [
        torch.func.vmap(torch.func.grad(energy), (None, 0))(w, x),
        torch.func.hessian(energy)(w, x),
        torch.func.jvp(lambda v: energy(v, x), (w,), (torch.ones(4),))[1],
    ]


def sparse() -> list[Tensor]:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.randint(0, 10, (6,))).pow(2).sum().backward()
        optimizer.step()
    coo = torch.eye(3).to_sparse().requires_grad_(True)
    torch.sparse.mm(coo, torch.ones(3, 2)).sum().backward()
    assert coo.grad is not None
    return [table.weight.detach(), coo.grad.to_dense()]


def nested() -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], requires_grad=True)
        out = torch.nested.to_padded_tensor(parts * 2.0, 0.0)
    out.sum().backward()
    assert parts.grad is not None
    return [out.detach(), torch.nested.to_padded_tensor(parts.grad, 0.0)]


def checkpointed() -> list[Tensor]:
    from torch.utils.checkpoint import checkpoint

    model = net()
    x = torch.randn(8, 6, requires_grad=True)
    for reentrant in (False, True):
        out = checkpoint(model, x, use_reentrant=reentrant)
        assert isinstance(out, Tensor)
        out.sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def second_order() -> list[Tensor]:
    weight = torch.randn(5, requires_grad=True)
    (slope,) = torch.autograd.grad((weight.pow(3) + Doubled.apply(weight)).sum(), weight, create_graph=True)
    slope.pow(2).sum().backward()
    assert weight.grad is not None
    return [slope.detach(), weight.grad]


def scripted() -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: torch.relu(x) * 2, torch.ones(3))
    x = torch.randn(3, requires_grad=True)
    traced(x).sum().backward()
    assert x.grad is not None
    return [x.grad]


class Tagged(Tensor):
    """A subclass that goes through the default `__torch_function__`."""


def subclassed() -> list[Tensor]:
    x = torch.randn(4).as_subclass(Tagged)
    weight = torch.randn(4, requires_grad=True)
    out = (x * weight).sum()
    assert type(out) is Tagged
    out.backward()
    assert weight.grad is not None
    return [out.detach().as_subclass(Tensor), weight.grad.as_subclass(Tensor)]


def in_threads() -> list[Tensor]:
    out: dict[int, Tensor] = {}

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(4, generator=generator).requires_grad_(True)
        (weight * weight).sum().backward()
        assert weight.grad is not None
        out[number] = weight.grad

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [out[number] for number in range(4)]


def without_memory() -> list[Tensor]:
    meta = nn.Linear(3, 2, device="meta")
    meta(torch.ones(1, 3, device="meta")).sum().backward()
    assert meta.weight.grad is not None
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = nn.Linear(3, 2)
        fake(torch.ones(1, 3)).sum().backward()
        assert fake.weight.grad is not None
    return [torch.tensor(list(meta.weight.grad.shape) + list(fake.weight.grad.shape))]


def modes_of_its_own() -> list[Tensor]:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append("f")
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    weight = torch.randn(4, requires_grad=True)
    with Functions(), Dispatches():
        (weight * 3).sum().backward()
    assert weight.grad is not None
    assert seen
    return [weight.grad]


PROGRAMS = [
    classifier, lbfgs, transforms, sparse, nested, checkpointed, second_order, scripted, subclassed, in_threads,
    without_memory, modes_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.torch.jit.script. is deprecated")
def test_a_traced_program_gives_the_same_bits_and_draws_the_same_numbers(program: Callable[[], list[Tensor]]) -> None:
    torch.manual_seed(3)
    plain = [*program(), torch.rand(4)]
    torch.manual_seed(3)
    with gradctl.watch(quiet=True) as seen:
        traced = [*program(), torch.rand(4)]
    assert seen.faults == []
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_healthy_program_of_each_kind_has_no_findings() -> None:
    for program in (classifier, lbfgs, transforms, sparse, second_order, in_threads):
        with gradctl.watch(quiet=True) as seen:
            program()
        assert seen.findings == [], program.__name__


def test_four_hundred_traced_steps_keep_no_tensor_alive() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()

    with gradctl.watch(model, quiet=True) as seen:
        for _ in range(10):
            step()
        before = tensors()
        for _ in range(400):
            step()
        assert tensors() <= before
    step()
    assert tensors() <= before
    assert seen.faults == []


def test_a_fault_in_the_tracer_never_reaches_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradctl._lineage import _tracer

    torch.manual_seed(3)
    plain = classifier()
    calls: list[int] = []
    inner = _tracer.Tracer.made

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            raise ValueError("ours")
        return inner(*args, **kwargs)

    monkeypatch.setattr(_tracer.Tracer, "made", sometimes)
    torch.manual_seed(3)
    with gradctl.watch(quiet=True) as seen:
        traced = classifier()
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    assert "ValueError: ours" in seen.faults[0]
    assert any("switched itself off" in remark for remark in seen.findings.remarks)


def test_a_fault_in_a_rule_never_reaches_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradctl._explain import _tracing

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("of a rule")

    monkeypatch.setattr(_tracing, "diagnose", broken)
    with gradctl.watch(quiet=True) as seen:
        classifier()
    assert seen.findings == []
    assert "ValueError: of a rule" in seen.faults[0]


def test_a_fault_of_what_is_called_when_it_is_done_never_reaches_the_program() -> None:
    called: list[int] = []
    tracing = Tracing(steps=2, on_done=lambda: called.append(tracing.steps))
    tracing.start()
    try:
        classifier()
    finally:
        tracing.stop()
    assert called == [2]
    assert tracing.done


def test_a_forked_child_is_not_traced_and_its_parent_goes_on() -> None:
    with gradctl.watch(quiet=True) as seen:
        child = os.fork()
        if not child:
            code = 1
            try:
                weight = torch.ones(3, requires_grad=True)
                (weight * 2).sum().backward()
                code = 0 if weight.grad is not None else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        classifier()
    assert seen.steps == 12
    assert seen.faults == []


def test_traces_and_sentinels_add_no_fork_handler_that_stays_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[Any] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **handlers: added.append(handlers))
    for _ in range(2):
        with gradctl.watch(quiet=True) as seen:
            classifier()
        assert seen.steps == 12
        sentinel = Sentinel()
        sentinel.install()
        assert sentinel.finish(None)["faults"] == []
    assert added == []


def test_workers_of_a_data_loader_load_as_ever(tmp_path: Path) -> None:
    # In a process of its own: the loader sets a signal handler for good.
    program = """
import torch, gradctl
from torch.utils.data import DataLoader, TensorDataset
data = TensorDataset(torch.arange(12.0).reshape(6, 2))
plain = [batch[0] for batch in DataLoader(data, batch_size=2, num_workers=1)]
with gradctl.watch(quiet=True) as seen:
    traced = [batch[0] for batch in DataLoader(data, batch_size=2, num_workers=1)]
assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
assert seen.faults == []
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr


def test_a_compiled_program_runs_eagerly_while_it_is_traced_and_compiled_afterwards(tmp_path: Path) -> None:
    # In a process of its own: the first use of the compiler patches torch itself.
    program = """
import torch, gradctl
compiled = []
def backend(graph, inputs):
    compiled.append(1)
    return graph.forward
model = torch.nn.Linear(4, 2)
fast = torch.compile(model, backend=backend)
x = torch.randn(3, 4)
with gradctl.watch(model, quiet=True) as seen:
    fast(x).sum().backward()
assert not compiled and seen.findings == [] and not seen.faults, (compiled, seen.findings, seen.faults)
fast(x).sum().backward()
assert compiled
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr


def test_the_findings_of_a_program_that_dies_while_it_is_watched_come_after_its_traceback(tmp_path: Path) -> None:
    program = tmp_path / "dies.py"
    program.write_text(
        "import torch, gradctl\n"
        "gradctl.watch().start()\n"
        "w = torch.ones(2, requires_grad=True)\n"
        "loss = (w * w).sum()\n"
        "loss.backward()\n"
        "loss.backward()\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    trace, _, told = done.stderr.partition("gradctl: ")
    assert "Trying to backward through the graph a second time" in trace
    assert "graph_reused   dies.py:5" in told
