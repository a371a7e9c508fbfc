"""What recording costs, next to what people use today. Interleaved in one process, CPU time.

    python benchmarks/run.py [--quick] [--models mlp,lstm,conv,gpt]

Each arm trains its own copy of a model; in every round each arm runs one block, and its CPU time a step is divided by
that of the plain arm in the same round. Two plain arms give the A/A spread. Results are written to
`benchmarks/results/run-<date>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import torch
from torch import Tensor, nn

from gradctl._journal import JournalWriter, read
from gradctl._record import Recorder
from gradctl._record._state import NEVER

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], Any]


# -- models -----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions and a short cut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with the residual added."""
        return torch.relu(x + self.body(x))


class Tagger(nn.Module):
    """An LSTM of two layers that labels tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = (
            nn.Embedding(200, 48),
            nn.LSTM(48, 64, 2, batch_first=True),
            nn.Linear(64, 20),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return self.head(self.lstm(self.table(x))[0]).flatten(0, 1)


class Gpt(nn.Module):
    """Six causal blocks, 128 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(500, 128), nn.Parameter(torch.zeros(64, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 6, nn.LayerNorm(128), enable_nested_tensor=False)
        self.head = nn.Linear(128, 500)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        mask = nn.Transformer.generate_square_subsequent_mask(64)
        return self.head(self.body(self.table(x) + self.places, mask=mask, is_causal=True)).flatten(0, 1)


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]:
    """Return a model, its optimizer and what computes a loss on a fresh batch."""
    torch.manual_seed(0)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
        x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))
    elif kind == "lstm":
        model = Tagger()
        x, y = torch.randint(0, 200, (16, 24)), torch.randint(0, 20, (16 * 24,))
    elif kind == "conv":
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), *[Residual(16) for _ in range(10)],
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip
        x, y = torch.randn(16, 3, 24, 24), torch.randint(0, 10, (16,))
    else:
        model = Gpt()
        x, y = torch.randint(0, 500, (4, 64)), torch.randint(0, 500, (4 * 64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return model, optimizer, lambda: nn.functional.cross_entropy(model(x), y)


# -- arms -------------------------------------------------------------------------------------------------------------


class Arm:
    """One way to train: `step` is timed, `enter` and `leave` are not."""

    def __init__(self, kind: str, after_backward: Callable[[nn.Module, Tensor], None] | None = None) -> None:
        self.model, optimizer, loss_of = build(kind)

        def step() -> None:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            if after_backward is not None:
                after_backward(self.model, loss)
            optimizer.step()

        self.step: Step = step
        self.steps = 1

    def enter(self) -> None:
        """Get ready to be timed."""

    def leave(self) -> None:
        """Stand aside while others are timed."""

    def close(self) -> None:
        """End for good."""


class RecordedArm(Arm):
    """Trains under the recorder, which listens and whose clock runs only while this arm does."""

    def __init__(self, kind: str, only: str = "default") -> None:
        super().__init__(kind)
        self.only = only
        self.writer = JournalWriter(Path(tempfile.mkdtemp()) / "journal.rank0.jsonl")
        self.recorder = Recorder(self.writer, budget=1e9 if only == "rows" else 0.01)
        self._left = time.perf_counter()

    def enter(self) -> None:
        """Listen, as if the time of the other arms had not passed."""
        pause = time.perf_counter() - self._left
        costs = self.recorder.costs
        if costs.first_step is not None:
            costs.first_step += pause
        for state in self.recorder.by_number.values():
            state.flush_time += pause
            if state.last_end is not None:
                state.last_end += pause
            if self.only == "stamps":
                state.next_norm = state.next_row = NEVER
            elif self.only == "rows":
                state.next_row = 0
        self.recorder.install()

    def step_densely(self) -> None:
        """Make one step in which a row is due."""
        for state in self.recorder.by_number.values():
            state.next_row = 0
        self._plain_step()

    def leave(self) -> None:
        """Stop listening for a while."""
        for handle in self.recorder._handles:
            handle.remove()
        self.recorder._handles = []
        self._left = time.perf_counter()

    def close(self) -> None:
        """Write the end record."""
        self.recorder.finish("stopped")
        self.writer.close()


def dense(kind: str) -> RecordedArm:
    arm = RecordedArm(kind, "rows")
    arm._plain_step = arm.step
    arm.step = arm.step_densely
    return arm


def lightning_norms(model: nn.Module, loss: Tensor) -> None:
    from lightning.pytorch.utilities import grad_norm

    grad_norm(model, 2)


def clip_and_float(model: nn.Module, loss: Tensor) -> None:
    float(nn.utils.clip_grad_norm_(model.parameters(), 1e9))


def with_tensorboard(kind: str, what: str) -> Arm:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(tempfile.mkdtemp())
    count = 0

    def log(model: nn.Module, loss: Tensor) -> None:
        nonlocal count
        count += 1
        for name, param in model.named_parameters():
            if what == "histograms":
                board.add_histogram(name, param.grad, count)
            else:
                board.add_scalar(name, param.grad.norm(), count)  # type: ignore[union-attr]

    arm = Arm(kind, log)
    arm.close = board.close  # type: ignore[method-assign]
    return arm


def with_wandb(kind: str, every: int | None) -> Arm:
    import wandb

    # One run for all: its hooks log to `wandb.run`, whichever run watches.
    run = wandb.run or wandb.init(project="bench", dir=tempfile.mkdtemp(), mode="offline")
    arm = Arm(kind, lambda model, loss: run.log({"loss": loss.item()}))
    if every is not None:
        run.watch(arm.model, log="gradients", log_freq=every, idx=every)
        arm.close = lambda: run.unwatch(arm.model)  # type: ignore[method-assign]
    return arm


def arms_of(kind: str, *, quick: bool) -> dict[str, Callable[[], Arm]]:
    arms: dict[str, Callable[[], Arm]] = {
        "plain": lambda: Arm(kind),
        "plain again (A/A)": lambda: Arm(kind),
        "gradctl, tier 0 only": lambda: RecordedArm(kind, "stamps"),
        "gradctl, default": lambda: RecordedArm(kind),
        "gradctl, a row every step": lambda: dense(kind),
        "clip_grad_norm_ + float": lambda: Arm(kind, clip_and_float),
        "Lightning grad_norm": lambda: Arm(kind, lightning_norms),
        "TensorBoard scalar a tensor": lambda: with_tensorboard(kind, "scalars"),
        "TensorBoard histograms": lambda: with_tensorboard(kind, "histograms"),
    }
    if not quick:
        arms["wandb.log of the loss"] = lambda: with_wandb(kind, None)
        arms["wandb.watch, every 1000 + log"] = lambda: with_wandb(kind, 1000)
        arms["wandb.watch, every step + log"] = lambda: with_wandb(kind, 1)
    return arms


def block_seconds(arm: Arm, steps: int) -> float:
    arm.enter()
    try:
        begin = time.process_time()
        for _ in range(steps):
            arm.step()
        return (time.process_time() - begin) / steps
    finally:
        arm.leave()


def compare(kind: str, *, rounds: int, seconds: float, quick: bool) -> dict[str, Any]:
    """Interleave the arms of one model; return ratios to the plain arm."""
    arms: dict[str, Arm] = {}
    missing: dict[str, str] = {}
    for name, make in arms_of(kind, quick=quick).items():
        try:
            arms[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    try:
        for arm in arms.values():
            block_seconds(arm, 8)  # the dense first rows, imports, caches
            arm.steps = max(2, min(2000, math.ceil(seconds / max(1e-5, block_seconds(arm, 4)))))
        times: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(rounds):
            order = list(arms) if number % 2 == 0 else list(arms)[::-1]
            for name in order:
                times[name].append(block_seconds(arms[name], arms[name].steps))
    finally:
        for arm in arms.values():
            arm.close()
    plain = times["plain"]
    recorder = arms["gradctl, default"].recorder  # type: ignore[attr-defined]
    end = read(recorder.journal.path).end
    assert end is not None
    return {
        "plain_us": 1e6 * statistics.median(plain),
        "tensors": sum(1 for _ in arms["plain"].model.parameters()),
        "arms": {
            name: {
                "ratio": statistics.median(a / b for a, b in zip(found, plain, strict=True)),
                "low": min(a / b for a, b in zip(found, plain, strict=True)),
                "high": max(a / b for a, b in zip(found, plain, strict=True)),
                "extra_us": 1e6 * statistics.median(a - b for a, b in zip(found, plain, strict=True)),
                "steps_a_block": arms[name].steps,
            }
            for name, found in times.items()
        },
        "missing": missing,
        "share": end.share,
        "one_off_seconds": end.one_off,
        "norm_every": end.tiers.get("norm_every"),
        "faults": end.faults,
    }


# -- single figures ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording(**options: Any) -> Iterator[Recorder]:
    recorder = Recorder(JournalWriter(Path(tempfile.mkdtemp()) / "journal.rank0.jsonl"), **options)
    recorder.install()
    try:
        yield recorder
    finally:
        recorder.finish("stopped")
        recorder.journal.close()


def first_steps(repeats: int) -> dict[str, float]:
    """The first 500 steps of a fresh MLP, everything included, recorded / plain."""

    def run(watch: bool) -> float:
        arm = Arm("mlp")
        with recording() if watch else contextlib.nullcontext():
            begin = time.process_time()
            for _ in range(500):
                arm.step()
            return time.process_time() - begin

    run(False)
    run(True)
    ratios = [run(True) / run(False) for _ in range(repeats)]
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def hooks() -> dict[str, float]:
    """Microseconds of tier 0 a step, drains included: our hooks around an engine and a step that do nothing."""
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    owner: Any = torch.autograd.Variable
    engine = owner._execution_engine

    class Idle:
        def run_backward(self, outputs: Any, *args: Any, **kwargs: Any) -> tuple[()]:
            return ()

    model, optimizer, _ = build("mlp")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    outputs = (torch.tensor(1.0),)
    owner._execution_engine = Idle()

    def loop(count: int) -> float:
        call = owner._execution_engine.run_backward
        before, after = list(_global_optimizer_pre_hooks.values()), list(_global_optimizer_post_hooks.values())
        begin = time.process_time()
        for _ in range(count):
            call(outputs, None, False, False, (), allow_unreachable=True, accumulate_grad=True)
            for hook in before:
                hook(optimizer, (optimizer,), {})
            for hook in after:
                hook(optimizer, (optimizer,), {})
        return 1e6 * (time.process_time() - begin) / count

    try:
        idle = min(loop(4000) for _ in range(5))
        with recording() as recorder:
            loop(50)
            (state,) = recorder.by_number.values()
            state.next_norm = state.next_row = NEVER
            watched = [loop(4000) for _ in range(7)]
    finally:
        owner._execution_engine = engine
    return {"best_us": min(watched) - idle, "median_us": statistics.median(watched) - idle}


def rows(kind: str, count: int) -> dict[str, float]:
    """Microseconds of a row, a tensor; error of sketches against full tensors."""
    model, optimizer, loss_of = build(kind)
    params = list(model.parameters())
    exact: dict[int, tuple[list[float], Tensor]] = {}
    costs: list[float] = []
    with recording(budget=1e9) as recorder:
        for number in range(1, count + 1):
            for state in recorder.by_number.values():
                state.next_row = 0
            optimizer.zero_grad()
            loss_of().backward()
            before = [param.detach().clone() for param in params]
            flat = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).double()
            optimizer.step()
            ratios = [
                float((p.detach() - b).norm() / b.norm()) if float(b.norm()) > 1e-8 else math.nan
                for p, b in zip(params, before, strict=True)
            ]
            exact[number] = ratios, flat
            costs += [state.row_cost for state in recorder.by_number.values()]
    journal = read(recorder.journal.path)
    errors, cosines = [], []
    for row in journal.rows:
        errors += [abs(u / r - 1) for u, r in zip(row.u, exact[row.n][0], strict=True) if u and r == r and r > 0]
        if row.cos is not None:
            full = float(nn.functional.cosine_similarity(exact[row.n][1], exact[row.n - 1][1], dim=0))
            cosines.append(abs(row.cos - full))
    errors.sort()
    return {
        "tensors": len(params),
        "us_a_tensor": 1e6 * statistics.median(costs) / len(params),
        "best_us_a_tensor": 1e6 * min(costs) / len(params),
        "ratio_error_median": errors[len(errors) // 2],
        "ratio_error_p95": errors[int(0.95 * len(errors))],
        "cosine_error_median": statistics.median(cosines),
        "cosine_error_max": max(cosines),
    }


def resident(tensors: int) -> dict[str, float]:
    """Growth of peak resident memory through recording, MiB, in processes of their own."""
    program = """
import resource, sys, tempfile, torch
from gradctl._record import Recorder
from gradctl._journal import JournalWriter
params = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(int(sys.argv[1]))]
optimizer = torch.optim.SGD(params, lr=1e-3)
recorder = Recorder(JournalWriter(tempfile.mktemp()), budget=1.0)
if sys.argv[2] == "1":
    recorder.install()
for _ in range(60):
    optimizer.zero_grad()
    sum(p.square().sum() for p in params).backward()
    optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

    def peak(watch: str) -> float:
        command = [sys.executable, "-c", program, str(tensors), watch]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    grown = [peak("1") - peak("0") for _ in range(3)]
    return {"tensors": tensors, "grown_mib": statistics.median(grown), "allowed_mib": 5 + tensors * 8 / 1024}


# -- results ----------------------------------------------------------------------------------------------------------


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def as_markdown(found: dict[str, Any]) -> str:
    where = found["where"]
    lines = [
        f"# What recording costs, {where['date']}",
        "",
        f"{where['processor']}, {where['cores']} cores, load {where['load']}; torch {where['torch']}, "
        f"Python {where['python']}, one thread. CPU time a step / plain, median of {where['rounds']} interleaved "
        "rounds in one process (lowest to highest). Only this process's CPU time is counted: what `wandb` does in its "
        "service process is not.",
        "",
    ]
    models = found["models"]
    lines += [
        "| | "
        + " | ".join(f"{kind} ({m['tensors']} tensors, {m['plain_us'] / 1e3:.2f} ms)" for kind, m in models.items())
        + " |"
    ]
    lines += ["|--" * (len(models) + 1) + "|"]
    for name in next(iter(models.values()))["arms"]:
        cells = []
        for model in models.values():
            arm = model["arms"].get(name)
            cells.append(f"{arm['ratio']:.3f} ({arm['low']:.2f} to {arm['high']:.2f})" if arm else "not run")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| figure | value | bound |", "|--|--|--|"]
    first, hot, sketch = found["first_500"], found["hooks"], found["rows"]
    lines += [
        f"| tier 0, hooks and drain, us a step | {hot['best_us']:.1f} (median {hot['median_us']:.1f}) | 5 |",
        f"| first 500 MLP steps | {first['ratio']:.3f} ({first['low']:.2f} to {first['high']:.2f}) | 1.10 |",
        f"| a row, us a tensor ({sketch['tensors']} tensors) | {sketch['best_us_a_tensor']:.1f} "
        f"(median {sketch['us_a_tensor']:.1f}) | 30 |",
        f"| update ratio against full tensors, p95 error | {sketch['ratio_error_p95']:.3f} | 0.10 |",
        f"| cosine against full tensors, largest error | {sketch['cosine_error_max']:.3f} | 0.10 |",
    ]
    if "mlp" in models:
        extra = models["mlp"]["arms"]["gradctl, default"]["extra_us"]
        lines.append(f"| default on the MLP, us a step | {extra:.1f} | 10 |")
    for grown in found["resident"]:
        lines.append(
            f"| resident growth, {grown['tensors']} tensors, MiB | {grown['grown_mib']:.1f} "
            f"| {grown['allowed_mib']:.1f} |"
        )
    for kind, model in models.items():
        lines.append(
            f"| {kind}: own share, one-off seconds | {model['share']:.4f}, {model['one_off_seconds']:.3f} | 0.01, 0.3 |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no wandb: about a minute")
    parser.add_argument("--models", default="mlp,lstm,conv,gpt")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quick = options.quick
    rounds, seconds = (3, 0.15) if quick else (7, 0.3)
    found: dict[str, Any] = {
        "where": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": f"{os.getloadavg()[0]:.1f}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": rounds,
            "quick": quick,
        },
        "hooks": hooks(),
        "first_500": first_steps(3 if quick else 9),
        "rows": rows("gpt", 8 if quick else 60),
        "resident": [resident(count) for count in ((200,) if quick else (20, 200, 1000))],
        "models": {},
    }
    for kind in options.models.split(","):
        found["models"][kind] = compare(kind, rounds=rounds, seconds=seconds, quick=quick)
        print(f"{kind} done", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"run-{found['where']['date']}{'-quick' if quick else ''}"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(found)
    (options.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
