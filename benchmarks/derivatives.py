"""What derivatives cost, next to one plain gradient of the same loss and to other libraries.

    python benchmarks/derivatives.py [--quick] [--tasks hvp,ggnvp] [--models cnn,mlp] [--out DIR]

A task is a quantity (a Hessian-vector product, a Jacobian, ...), its arms are ways to compute it: ours, by hand with
torch, and those of other libraries that are installed and take the model. All arms of a task and a model run in one
process; in every round each runs one block, the order turned round from round to round, and its CPU time is divided by
that of one plain gradient in the same round. Two arms of plain gradients give the A/A spread, which is noise alone.

Before the clock runs, every arm's answer is compared with the reference arm's: an arm that is off by more than the
task's tolerance is shown with its error, and is no peer. Bars: those against one gradient that are listed in `BARS`,
and ours at most 1.05 times the fastest arm that is right. Results are written to
`benchmarks/results/derivatives-<date>.json` and `.md`; the exit code is 1 when a bar is missed.

The C library keeps freed memory (no trimming, no mmap): else page faults of large temporaries are what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import derivatives_samples as samples
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

import gradctl

RESULTS = Path(__file__).parent / "results"
GRADIENT, AGAIN = "one gradient", "one gradient again (A/A)"
PEER_BAR = 1.05
CE = nn.functional.cross_entropy


# -- models -----------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM and a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(32, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return self.head(self.body(x)[0][:, -1])


class Transformer(nn.Module):
    """Two encoder layers and a head on the mean of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return self.head(self.body(x).mean(1))


def network(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a network and a batch for it, seeded."""
    torch.manual_seed(0)
    if kind == "cnn":  # 10k parameters
        parts = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        return nn.Sequential(*parts, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)), torch.randn(64, 1, 16, 16)
    if kind == "mlp":  # 134k parameters
        parts = (nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        return nn.Sequential(*parts), torch.randn(128, 256)
    if kind == "transformer":
        return Transformer(), torch.randn(16, 32, 64)
    if kind == "tanh":  # 2410 parameters: a whole Hessian can be looped over
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), torch.randn(256, 64)
    if kind == "wide":  # few inputs, many outputs
        return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 256)), torch.randn(64, 4)
    return Recurrent(), torch.randn(32, 16, 32)


@dataclass
class Case:
    """One network on one batch, with all that the arms need."""

    kind: str
    model: nn.Module = field(init=False)
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.x = network(self.kind)
        self.y = torch.randint(0, 10, (len(self.x),))

    @cached_property
    def params(self) -> list[Tensor]:
        """The parameters in their order."""
        return list(self.model.parameters())

    @cached_property
    def v(self) -> dict[str, Tensor]:
        """A direction by name."""
        return {name: torch.randn_like(param) for name, param in self.model.named_parameters()}

    @cached_property
    def vs(self) -> list[Tensor]:
        """The same direction in the order of the parameters."""
        return list(self.v.values())

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        return CE(self.model(self.x), self.y)

    def math_loss(self) -> Tensor:
        """Return the loss with the backend of attention that has second derivatives."""
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return self.loss()

    def math_outputs(self) -> Tensor:
        """Return the outputs, likewise."""
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return self.model(self.x)

    def functional(self, params: dict[str, Tensor]) -> Tensor:
        """Return the loss for other parameters."""
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return CE(functional_call(self.model, params, (self.x,)), self.y)

    def named(self) -> dict[str, Tensor]:
        """The parameters by name, without their graphs."""
        return {name: param.detach() for name, param in self.model.named_parameters()}


# -- arms -------------------------------------------------------------------------------------------------------------

Run = Callable[[], Any]
Make = Callable[[Case], Run]


@dataclass
class Task:
    """A quantity and the ways to compute it.

    `ours` are the arms held to the bars; `compare` names the arms that compute the same thing at the same stage, among
    which ours may be at most 1.05 times the fastest that is right.
    """

    models: tuple[str, ...]
    reference: str
    arms: dict[str, Make]
    ours: tuple[str, ...]
    compare: dict[str, tuple[str, ...]]
    tolerance: float = 1e-4


def one_gradient(case: Case) -> Run:
    return lambda: torch.autograd.grad(case.loss(), case.params)


def hvp_by_hand(case: Case) -> Run:
    def run() -> Any:
        gradient = torch.autograd.grad(case.math_loss(), case.params, create_graph=True)
        return torch.autograd.grad(gradient, case.params, case.vs)

    return run


def hvp_by_hand_kept(case: Case) -> Run:
    gradient = torch.autograd.grad(case.math_loss(), case.params, create_graph=True)
    return lambda: torch.autograd.grad(gradient, case.params, case.vs, retain_graph=True)


def hvp_ours_kept(case: Case) -> Run:
    operator = gradctl.HessianOperator(case.loss, case.model)
    return lambda: operator(case.v)


def hvp_func(case: Case) -> Run:
    named = case.named()
    return lambda: torch.func.jvp(torch.func.grad(case.functional), (named,), (case.v,))[1]


def hvp_func_reverse(case: Case) -> Run:
    named = case.named()
    return lambda: torch.func.vjp(torch.func.grad(case.functional), named)[1](case.v)[0]


def hvp_functional(case: Case) -> Run:
    names, values = list(case.named()), tuple(case.named().values())

    def loss(*params: Tensor) -> Tensor:
        return case.functional(dict(zip(names, params, strict=True)))

    return lambda: torch.autograd.functional.vhp(loss, values, tuple(case.vs))[1]


def hvp_backpack(case: Case) -> Run:
    product = importlib.import_module("backpack.hessianfree.hvp").hessian_vector_product
    return lambda: product(case.math_loss(), case.params, case.vs)


def hvp_curvlinops(case: Case) -> Run:
    library = importlib.import_module("curvlinops")
    operator = library.HessianLinearOperator(case.model, CE, case.params, [(case.x, case.y)], check_deterministic=False)
    return lambda: operator @ case.vs


def ggn_by_hand(case: Case) -> Run:
    """One dual forward, backward of the same graph, the loss's Hessian in closed form."""

    def run() -> Any:
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(param, case.v[name]) for name, param in case.model.named_parameters()}
            with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
                outputs = functional_call(case.model, duals, (case.x,))
            z, moved = forward_ad.unpack_dual(outputs)
        moved = moved.detach()
        p = z.detach().softmax(1)
        bent = p * (moved - (p * moved).sum(1, keepdim=True)) / len(p)
        return torch.autograd.grad(z, case.params, bent)

    return run


def ggn_by_hand_kept(case: Case) -> Run:
    z = case.math_outputs()
    u = torch.zeros_like(z, requires_grad=True)
    transposed = torch.autograd.grad(z, case.params, u, create_graph=True)
    p = z.detach().softmax(1)

    def run() -> Any:
        (moved,) = torch.autograd.grad(transposed, u, case.vs, retain_graph=True)
        bent = p * (moved - (p * moved).sum(1, keepdim=True)) / len(p)
        return torch.autograd.grad(z, case.params, bent, retain_graph=True)

    return run


def ggn_by_hand_reverse(case: Case) -> Run:
    return lambda: ggn_by_hand_kept(case)()


def ggn_ours_kept(case: Case) -> Run:
    operator = gradctl.GGNOperator(case.loss, case.model)
    return lambda: operator(case.v)


def ggn_func(case: Case) -> Run:
    named = case.named()

    def outputs(params: dict[str, Tensor]) -> Tensor:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return functional_call(case.model, params, (case.x,))

    def run() -> Any:
        z, moved = torch.func.jvp(outputs, (named,), (case.v,))
        p = z.softmax(1)
        bent = p * (moved - (p * moved).sum(1, keepdim=True)) / len(p)
        return torch.func.vjp(outputs, named)[1](bent)[0]

    return run


def ggn_backpack(case: Case) -> Run:
    product = importlib.import_module("backpack.hessianfree.ggnvp").ggn_vector_product

    def run() -> Any:
        z = case.math_outputs()
        return product(CE(z, case.y), z, case.model, case.vs)

    return run


def ggn_curvlinops(case: Case) -> Run:
    library = importlib.import_module("curvlinops")
    operator = library.GGNLinearOperator(
        case.model, nn.CrossEntropyLoss(), case.params, [(case.x, case.y)], check_deterministic=False
    )
    return lambda: operator @ case.vs


def jacobian_func(direction: str) -> Make:
    transform = torch.func.jacrev if direction == "reverse" else torch.func.jacfwd

    def make(case: Case) -> Run:
        named = case.named()

        def one(sample: Tensor) -> Tensor:
            return functional_call(case.model, named, (sample.unsqueeze(0),))[0]

        return lambda: torch.func.vmap(transform(one))(case.x)

    return make


def jacobian_batched(case: Case) -> Run:
    def run() -> Any:
        x = case.x.detach().requires_grad_()
        z = case.model(x)
        units = torch.eye(z.shape[1]).unsqueeze(1).expand(z.shape[1], *z.shape)
        return torch.autograd.grad(z, x, units, is_grads_batched=True)[0].movedim(1, 0)

    return run


def jacobian_looped(case: Case) -> Run:
    def run() -> Any:
        x = case.x.detach().requires_grad_()
        z = case.model(x)
        return torch.stack([torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)[0] for k in range(z.shape[1])], 1)

    return run


def diagonal_looped(case: Case) -> Run:
    def run() -> Any:
        gradient = torch.autograd.grad(case.loss(), case.params, create_graph=True)
        found: list[Tensor] = []
        for grad, param in zip(gradient, case.params, strict=True):
            flat = grad.reshape(-1)
            rows = [torch.autograd.grad(flat[k], param, retain_graph=True)[0].reshape(-1)[k] for k in range(len(flat))]
            found.append(torch.stack(rows).view_as(param))
        return found

    return run


def diagonal_backpack(case: Case) -> Run:
    library = importlib.import_module("backpack")
    extension = importlib.import_module("backpack.extensions").DiagHessian
    model, loss = library.extend(network(case.kind)[0]), library.extend(nn.CrossEntropyLoss())

    def run() -> Any:
        model.zero_grad()
        with library.backpack(extension()):
            loss(model(case.x), case.y).backward()
        return [param.diag_h for param in model.parameters()]

    return run


def sharpness_scipy(case: Case) -> Run:
    """Lanczos of SciPy, with products by double backward from scratch."""
    sparse = importlib.import_module("scipy.sparse.linalg")
    size = sum(param.numel() for param in case.params)

    def times(flat: Any) -> Any:
        pieces = torch.from_numpy(flat).float().split([param.numel() for param in case.params])
        vs = [piece.view_as(param) for piece, param in zip(pieces, case.params, strict=True)]
        gradient = torch.autograd.grad(case.math_loss(), case.params, create_graph=True)
        found = torch.autograd.grad(gradient, case.params, vs)
        return torch.cat([each.reshape(-1) for each in found]).numpy()

    operator = sparse.LinearOperator((size, size), matvec=times, dtype="float32")
    return lambda: torch.tensor(sparse.eigsh(operator, k=1, which="LA", tol=1e-2, return_eigenvectors=False))


ALL = ("cnn", "mlp", "transformer", "lstm")
TASKS: dict[str, Task] = {
    "hvp": Task(
        models=ALL,
        reference="double backward by hand",
        arms={
            "gradctl.hvp": lambda case: lambda: gradctl.hvp(case.loss, case.model, case.v),
            "double backward by hand": hvp_by_hand,
            "autograd.functional.vhp": hvp_functional,
            "func.vjp(grad)": hvp_func_reverse,
            "func.jvp(grad)": hvp_func,
            "backpack": hvp_backpack,
            "curvlinops": hvp_curvlinops,
            "HessianOperator, a further product": hvp_ours_kept,
            "double backward by hand, a further product": hvp_by_hand_kept,
        },
        ours=("gradctl.hvp", "HessianOperator, a further product"),
        compare={
            "gradctl.hvp": (
                "double backward by hand",
                "autograd.functional.vhp",
                "func.vjp(grad)",
                "func.jvp(grad)",
                "backpack",
                "curvlinops",
            ),
            "HessianOperator, a further product": ("double backward by hand, a further product",),
        },
    ),
    "ggnvp": Task(
        models=ALL,
        reference="double-vjp by hand",
        arms={
            "gradctl.ggnvp": lambda case: lambda: gradctl.ggnvp(case.loss, case.model, case.v),
            "dual forward by hand": ggn_by_hand,
            "double-vjp by hand": ggn_by_hand_reverse,
            "func.jvp and vjp": ggn_func,
            "backpack": ggn_backpack,
            "curvlinops": ggn_curvlinops,
            "GGNOperator, a further product": ggn_ours_kept,
            "double-vjp by hand, a further product": ggn_by_hand_kept,
        },
        ours=("gradctl.ggnvp", "GGNOperator, a further product"),
        compare={
            "gradctl.ggnvp": (
                "dual forward by hand",
                "double-vjp by hand",
                "func.jvp and vjp",
                "backpack",
                "curvlinops",
            ),
            "GGNOperator, a further product": ("double-vjp by hand, a further product",),
        },
    ),
    "jacobian": Task(
        models=("mlp", "cnn", "wide"),
        reference="loop over the outputs",
        arms={
            "gradctl.jacobian": lambda case: lambda: gradctl.jacobian(case.model, case.x, batch="samples"),
            "loop over the outputs": jacobian_looped,
            "is_grads_batched by hand": jacobian_batched,
            "vmap(jacrev)": jacobian_func("reverse"),
            "vmap(jacfwd)": jacobian_func("forward"),
        },
        ours=("gradctl.jacobian",),
        compare={
            "gradctl.jacobian": (
                "loop over the outputs",
                "is_grads_batched by hand",
                "vmap(jacrev)",
                "vmap(jacfwd)",
            )
        },
    ),
    "hessian_diagonal": Task(
        models=("tanh",),
        reference="a loop of products",
        arms={
            "gradctl.hessian_diagonal": lambda case: lambda: gradctl.hessian_diagonal(case.loss, case.model),
            "gradctl, method='products'": lambda case: (
                lambda: gradctl.hessian_diagonal(case.loss, case.model, method="products")
            ),
            "a loop of products": diagonal_looped,
            "backpack DiagHessian": diagonal_backpack,
        },
        ours=("gradctl.hessian_diagonal",),
        compare={"gradctl.hessian_diagonal": ("a loop of products", "backpack DiagHessian")},
    ),
    "sharpness": Task(
        models=("tanh", "mlp", "cnn"),
        reference="eigsh with products by hand",
        arms={
            "gradctl.sharpness": lambda case: lambda: torch.tensor([gradctl.sharpness(case.loss, case.model).value]),
            "eigsh with products by hand": sharpness_scipy,
        },
        ours=("gradctl.sharpness",),
        compare={"gradctl.sharpness": ("eigsh with products by hand",)},
        tolerance=2e-2,
    ),
    "per_sample_grads": Task(
        models=ALL,
        reference="loop over the samples",
        arms=samples.GRADS,
        ours=("gradctl.per_sample_grads",),
        compare={"gradctl.per_sample_grads": ("vmap(grad)", "loop over the samples")},
    ),
    "per_sample_norms": Task(
        models=ALL,
        reference="vmap(grad), then norms",
        arms=samples.NORMS,
        ours=("gradctl.per_sample_norms",),
        compare={"gradctl.per_sample_norms": ("vmap(grad), then norms", "opacus ghost norms", "backpack BatchL2Grad")},
    ),
    "gradient_penalty": Task(
        models=("cnn", "mlp"),
        reference="create_graph by hand",
        arms=samples.PENALTIES,
        ours=("gradctl.gradient_penalty",),
        compare={"gradctl.gradient_penalty": ("create_graph by hand", "grad(vmap(grad))")},
    ),
    "unrolled": Task(
        models=("cnn", "mlp"),
        reference="functional_call by hand",
        arms=samples.LOOPS,
        ours=("gradctl.unrolled",),
        compare={"gradctl.unrolled": ("functional_call by hand", "higher")},
    ),
}
BARS: dict[tuple[str, str, str], float] = {
    **{("hvp", kind, "gradctl.hvp"): 2.3 for kind in ("cnn", "mlp", "transformer")},
    **{("hvp", kind, "HessianOperator, a further product"): 1.4 for kind in ("cnn", "mlp", "transformer")},
    **{("ggnvp", kind, "gradctl.ggnvp"): 1.8 for kind in ("cnn", "mlp")},
    **{("ggnvp", kind, "GGNOperator, a further product"): 1.25 for kind in ("cnn", "mlp")},
    ("per_sample_norms", "mlp", "gradctl.per_sample_norms"): 1.25,
    ("per_sample_norms", "cnn", "gradctl.per_sample_norms"): 1.6,
}


# -- measurement ------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed; False where it is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        trim, mmap_max = -1, -4
        return bool(library.mallopt(trim, 1 << 30)) and bool(library.mallopt(mmap_max, 0))
    return False


def flat(found: Any) -> Tensor:
    """Return an answer of any arm as one vector."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, Tensor):
        return found.detach().reshape(-1).double()
    return torch.cat([each.detach().reshape(-1).double() for each in found])


def prepared(task: Task, case: Case) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """Make every arm and run it once: return those that run, their errors, and why the others are left out."""
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    wanted = flat(task.arms[task.reference](case)())
    for name, make in task.arms.items():
        try:
            run = make(case)
            found = flat(run())
        except Exception as error:  # whatever another library says: it is shown beside its name
            left_out[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:90]}"
            continue
        runs[name] = run
        errors[name] = float((found - wanted).norm() / wanted.norm()) if found.shape == wanted.shape else math.inf
    return runs, errors, left_out


def block_seconds(run: Run, count: int) -> float:
    """Return the CPU seconds of one run, after one untimed."""
    run()
    begin = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - begin) / count


def compare(name: str, kind: str, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Interleave the arms of one task on one model; return their ratios to one gradient."""
    task, case = TASKS[name], Case(kind)
    runs, errors, left_out = prepared(task, case)
    runs = {GRADIENT: one_gradient(case), AGAIN: one_gradient(case), **runs}
    counts = {arm: max(1, math.ceil(seconds / max(block_seconds(run, 1), 1e-6))) for arm, run in runs.items()}
    times: dict[str, list[float]] = {arm: [] for arm in runs}
    for number in range(rounds):
        for arm in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            times[arm].append(block_seconds(runs[arm], counts[arm]))
    arms: dict[str, Any] = {}
    for arm, found in times.items():
        each = [a / b for a, b in zip(found, times[GRADIENT], strict=True)]
        arms[arm] = {
            "ratio": round(statistics.median(each), 3),
            "low": round(min(each), 3),
            "high": round(max(each), 3),
            "error": errors.get(arm),
        }
    for ours, peers in task.compare.items():
        right = [peer for peer in peers if peer in arms and errors[peer] <= task.tolerance]
        if ours in arms and right:
            fastest = min(right, key=lambda peer: arms[peer]["ratio"])
            each = [a / b for a, b in zip(times[ours], times[fastest], strict=True)]
            arms[ours] |= {"fastest_peer": fastest, "to_fastest": round(statistics.median(each), 3)}
    return {
        "gradient_ms": round(1e3 * statistics.median(times[GRADIENT]), 3),
        "parameters": sum(param.numel() for param in case.params),
        "batch": len(case.x),
        "arms": arms,
        "left_out": left_out,
    }


# -- results ----------------------------------------------------------------------------------------------------------


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are compared."""
    from importlib import metadata

    found: dict[str, str] = {}
    for name in ("torch", "backpack-for-pytorch", "curvlinops-for-pytorch", "opacus", "higher", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def missed(results: dict[str, dict[str, Any]]) -> list[str]:
    """Say which bars were missed, and which of our answers is wrong."""
    lines: list[str] = []
    for name, models in results.items():
        task = TASKS[name]
        for kind, found in models.items():
            for arm in task.ours:
                if arm not in found["arms"]:
                    lines.append(f"{name}, {kind}: {arm} did not run: {found['left_out'].get(arm)}")
                    continue
                row, bar = found["arms"][arm], BARS.get((name, kind, arm))
                if bar is not None and row["ratio"] > bar:
                    lines.append(f"{name}, {kind}: {arm} {row['ratio']:.2f} x one gradient > {bar}")
                if row.get("to_fastest", 0.0) > PEER_BAR:
                    lines.append(f"{name}, {kind}: {arm} {row['to_fastest']:.2f} x {row['fastest_peer']} > {PEER_BAR}")
                if row["error"] > task.tolerance:
                    lines.append(f"{name}, {kind}: {arm} is off by {row['error']:.1e}")
    return lines


def as_markdown(found: dict[str, Any]) -> str:
    where = found["where"]
    lines = [
        f"# What derivatives cost, {where['date']}",
        "",
        f"{where['processor']}, {where['cores']} cores, load {where['load']}; Python {where['python']}, one thread; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + f". CPU time / one gradient of the same loss, median of {where['rounds']} interleaved rounds in one process "
        "(lowest to highest); in brackets the error relative to the reference where it is above 1e-5.",
    ]
    for name, models in found["tasks"].items():
        lines += ["", f"## {name}", ""]
        heads = [
            f"{kind} ({m['parameters']} parameters, B={m['batch']}, {m['gradient_ms']:.2f} ms)"
            for kind, m in models.items()
        ]
        lines += [f"| | {' | '.join(heads)} |", "|--" * (len(heads) + 1) + "|"]
        for arm in (AGAIN, *TASKS[name].arms):
            cells = [_cell(name, kind, arm, model) for kind, model in models.items()]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        for kind, model in models.items():
            lines += [f"- {kind}: {arm} left out: {reason}" for arm, reason in model["left_out"].items()]
            for arm in TASKS[name].ours:
                row = model["arms"].get(arm, {})
                if "to_fastest" in row:
                    lines.append(f"- {kind}: {arm} is {row['to_fastest']:.2f} x {row['fastest_peer']}")
    lines += ["", *(f"Missed: {line}" for line in found["missed"])] if found["missed"] else ["", "Every bar is met."]
    return "\n".join(lines) + "\n"


def _cell(name: str, kind: str, arm: str, model: dict[str, Any]) -> str:
    if arm not in model["arms"]:
        return "–"
    row, bar = model["arms"][arm], BARS.get((name, kind, arm))
    error = f" [{row['error']:.0e}]" if row["error"] is not None and row["error"] > 1e-5 else ""
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}){error}" + (f", bar {bar}" if bar else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short rounds: shows that it runs, not what it costs")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--models", default="")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # other libraries' own
    rounds, seconds = (3, 0.05) if options.quick else (11, 0.4)
    only = set(options.models.split(",")) - {""}
    found: dict[str, Any] = {
        "where": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": f"{os.getloadavg()[0]:.1f}",
            "python": platform.python_version(),
            "versions": versions(),
            "memory_kept": keep_freed_memory(),
            "rounds": rounds,
            "quick": options.quick,
        },
        "tasks": {},
    }
    for name in options.tasks.split(","):
        for kind in TASKS[name].models:
            if not only or kind in only:
                found["tasks"].setdefault(name, {})[kind] = compare(name, kind, rounds=rounds, seconds=seconds)
                print(f"{name}, {kind} done", file=sys.stderr)
    found["missed"] = missed(found["tasks"])
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"derivatives-{found['where']['date']}{'-quick' if options.quick else ''}"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(found)
    (options.out / f"{name}.md").write_text(text)
    print(text)
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
