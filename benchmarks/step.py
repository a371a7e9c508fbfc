"""What `gradctl.Step` costs beside the loop written by hand, and how exact its gradients are.

    python benchmarks/step.py [--quick] [--out DIR]

Three tables, one process, one thread, CPU time:

- a step: each arm trains its own copy of a model; in every round each arm runs a few steps, the order turned round from
  round to round, and its time is divided by that of its loop in the same round. Loops are the usual lines, with
  `clip_grad_norm_` where Step clips. Two equal loops give the A/A spread, which is noise alone.
- clipping alone: from the parameters to clipped gradients, beside `torch.nn.utils.clip_grad_norm_`; once with a norm
  above the limit and once below. Gradients are new tensors in every call, as a backward leaves them.
- exactness: the gradient of a step of k uneven microbatches, against one big batch in float64, divided by the error
  that one big batch has in float32.

Results are written to `benchmarks/results/step-<date>.json` and `.md`; the exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradctl
from gradctl._buckets import Buckets

RESULTS = Path(__file__).parent / "results"
STEP_BAR, CLIP_STEP_BAR, EXACT_BAR = 1.01, 1.01, 4.0
SMALL_BAR, LARGE_BAR = 0.3, 1.0

# -- models -----------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM over 12 places."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(32, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch [n, 384]."""
        return self.head(self.body(x.view(-1, 12, 32))[0][:, -1])


class Attention(nn.Module):
    """Two encoder layers over 12 places, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch [n, 384]."""
        return self.head(self.body(x.view(-1, 12, 32)).mean(1))


def model_of(kind: str) -> nn.Module:
    """Return a model of inputs [n, 384] and 10 classes; seeded, so that two calls give the same."""
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(384, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    if kind == "deep":
        layers = [part for _ in range(20) for part in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
        return nn.Sequential(nn.Linear(384, 64), *layers, nn.Linear(64, 10))
    if kind == "cnn":
        return nn.Sequential(
            nn.Unflatten(1, (6, 8, 8)), nn.Conv2d(6, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
    return Attention() if kind == "transformer" else Recurrent()


ROWS = {"mlp": 192, "deep": 128, "cnn": 96, "transformer": 64, "lstm": 64}


def data(rows: int) -> tuple[Tensor, Tensor]:
    """Return a batch."""
    torch.manual_seed(1)
    return torch.randn(rows, 384), torch.randint(0, 10, (rows,))


# -- a step -----------------------------------------------------------------------------------------------------------


def loop(kind: str, clip: float | None = None) -> Callable[[], object]:
    """Return one step as it is written by hand."""
    model, (x, y) = model_of(kind), data(ROWS[kind])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> object:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return loss.detach()

    return step


def ours(kind: str, clip: float | None = None, **options: Any) -> Callable[[], object]:
    """Return one step by gradctl."""
    model, (x, y) = model_of(kind), data(ROWS[kind])
    step = gradctl.Step(model, torch.optim.AdamW(model.parameters(), lr=1e-4), clip=clip, **options)

    def one() -> object:
        with step.forward():
            loss = F.cross_entropy(model(x), y)
        step.backward(loss)
        return step.update()

    return one


# Each arm, what makes it, and the loop that it is held against. A limit of 0.01 always clips.
ARMS: dict[str, tuple[Callable[[str], Callable[[], object]], str]] = {
    "loop": (loop, "loop"),
    "loop again (A/A)": (loop, "loop"),
    "Step": (ours, "loop"),
    'Step(on_nonfinite="skip")': (lambda kind: ours(kind, on_nonfinite="skip"), "loop"),
    "loop, clipped": (lambda kind: loop(kind, 0.01), "loop, clipped"),
    "Step(clip=0.01)": (lambda kind: ours(kind, 0.01), "loop, clipped"),
    'Step(precision="bf16-autocast")': (lambda kind: ours(kind, precision="bf16-autocast"), "loop"),
    'Step(precision="bf16-master")': (lambda kind: ours(kind, precision="bf16-master"), "loop"),
}
STEP_BARS = {
    "Step": STEP_BAR,
    "Step(clip=0.01)": CLIP_STEP_BAR,
}


def steps(kind: str, rounds: int, each: int) -> dict[str, Any]:
    """Interleave the arms of one model; return their ratios."""
    arms = {name: make(kind) for name, (make, _) in ARMS.items()}
    for arm in arms.values():
        for _ in range(5):
            arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            arm = arms[name]
            arm()
            begin = time.process_time_ns()
            for _ in range(each):
                arm()
            times[name].append((time.process_time_ns() - begin) / each)
    found = {name: ratios(times[name], times[against]) for name, (_, against) in ARMS.items()}
    return {"loop_ms": round(statistics.median(times["loop"]) / 1e6, 2), "arms": found}


def ratios(found: list[float], base: list[float]) -> dict[str, float]:
    """Return the median of the ratios within a round, its standard error, and the extra microseconds."""
    each = [a / b for a, b in zip(found, base, strict=True)]
    quarters = statistics.quantiles(each, n=4) if len(each) > 3 else [min(each), 0.0, max(each)]
    return {
        "ratio": round(statistics.median(each), 4),
        "error": round(1.25 * (quarters[2] - quarters[0]) / 1.35 / math.sqrt(len(each)), 4),
        "extra_us": round(statistics.median(a - b for a, b in zip(found, base, strict=True)) / 1e3, 1),
    }


# -- clipping ---------------------------------------------------------------------------------------------------------

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "200 × [64, 64]": [(64, 64)] * 200,
    "1000 × [32]": [(32,)] * 1000,
    "600: [64, 64], [64], [64], …": [(64, 64), (64,), (64,)] * 200,
    "8 × [1024, 1024]": [(1024, 1024)] * 8,
}


def clipping(shapes: list[tuple[int, ...]], limit: float, rounds: int) -> dict[str, float]:
    """Time clipping of gradients, beside torch's."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    values = [torch.randn(shape) for shape in shapes]
    buckets = Buckets()

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, limit)

    def clip() -> None:
        gradients = buckets.of(parameters)
        norm = gradients.norm()
        if norm > limit:
            gradients.multiply(limit / (norm + 1e-6))

    arms = {"torch": theirs, "torch again": theirs, "gradctl": clip}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 3):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.grad = None
                parameter.grad = value + 0.0
            begin = time.process_time_ns()
            arms[name]()
            if number >= 3:
                times[name].append(time.process_time_ns() - begin)
    base = [(a + b) / 2 for a, b in zip(times["torch"], times["torch again"], strict=True)]
    aa = ratios(times["torch again"], times["torch"])["ratio"]
    return {"torch_us": round(statistics.median(base) / 1e3, 1), "aa": aa, **ratios(times["gradctl"], base)}


# -- exactness --------------------------------------------------------------------------------------------------------


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the mean loss as one vector, float64."""
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([each.flatten() for each in found]).double()


def exactness(kind: str, microbatches: int) -> float:
    """Return the error of a step of uneven microbatches, in units of the error of one big float32 batch."""
    model, (x, y) = model_of(kind), data(97)
    exact = gradient(copy.deepcopy(model).double(), x.double(), y)
    scale = float((gradient(model, x, y) - exact).norm())
    sizes = [len(part) for part in torch.arange(97).chunk(microbatches)]
    sizes[0], sizes[-1] = sizes[0] + sizes[-1] - 1, 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[Tensor] = []
    optimizer.register_step_post_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())  # pyright: ignore[reportOptionalMemberAccess]
    )
    step = gradctl.Step(model, optimizer, accumulate=len(sizes))
    step(list(zip(x.split(sizes), y.split(sizes), strict=True)), lambda part: F.cross_entropy(model(part[0]), part[1]))
    return round(float((seen[0] - exact).norm()) / scale, 2)


# -- results ----------------------------------------------------------------------------------------------------------


def processor() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def missed(found: dict[str, Any]) -> list[str]:
    """Say which bars were missed."""
    lines = [
        f"{kind}, {name}: {model['arms'][name]['ratio']:.4f} > {bar}"
        for kind, model in found["steps"].items()
        for name, bar in STEP_BARS.items()
        if model["arms"][name]["ratio"] > bar
    ]
    lines += [
        f"clipping {name}, {when} the limit: {each['ratio']:.3f} > {bar_of(name)}"
        for name, both in found["clipping"].items()
        for when, each in both.items()
        if each["ratio"] > bar_of(name)
    ]
    lines += [
        f"{kind} in {k} microbatches: {error} × the error of one big batch > {EXACT_BAR}"
        for kind, each in found["exactness"].items()
        for k, error in each.items()
        if error > EXACT_BAR
    ]
    return lines


def bar_of(shapes: str) -> float:
    """Return the bar of clipping."""
    return LARGE_BAR if "1024" in shapes else SMALL_BAR


def as_markdown(found: dict[str, Any]) -> str:
    """Return the tables."""
    where = found["where"]
    lines = [
        f"# One step, {where['date']}",
        "",
        f"{where['processor']}, {where['cores']} cores, load {where['load']}; torch {where['torch']}, Python "
        f"{where['python']}, one thread. CPU time, median of {where['rounds']} interleaved rounds (± standard error).",
        "",
        "A step / the loop written by hand, AdamW:",
        "",
        "| | " + " | ".join(f"{kind} ({m['loop_ms']} ms)" for kind, m in found["steps"].items()) + " | bar |",
        "|--" * (len(found["steps"]) + 2) + "|",
    ]
    for name, (_, against) in ARMS.items():
        cells = [
            f"{m['arms'][name]['ratio']:.3f} ± {m['arms'][name]['error']:.3f}, {m['arms'][name]['extra_us']:+.0f} µs"
            for m in found["steps"].values()
        ]
        beside = "" if against == "loop" or name == against else f" / {against}"
        lines.append(f"| {name}{beside} | {' | '.join(cells)} | {STEP_BARS.get(name, '')} |")
    lines += [
        "",
        "Clipping / `clip_grad_norm_`:",
        "",
        "| gradients | torch, µs | A/A | above the limit | below | bar |",
        "|--|--|--|--|--|--|",
    ]
    for name, both in found["clipping"].items():
        above, below = both["above"], both["below"]
        lines.append(
            f"| {name} | {above['torch_us']:.0f} | {above['aa']:.2f} | {above['ratio']:.2f} ± {above['error']:.2f} | "
            f"{below['ratio']:.2f} ± {below['error']:.2f} | {bar_of(name)} |"
        )
    lines += [
        "",
        f"Error of a step of k uneven microbatches of 97 rows / error of one big float32 batch (bar {EXACT_BAR}):",
        "",
        "| | " + " | ".join(f"k = {k}" for k in next(iter(found["exactness"].values()))) + " |",
        "|--" * (1 + len(next(iter(found["exactness"].values())))) + "|",
    ]
    lines += [f"| {kind} | {' | '.join(map(str, each.values()))} |" for kind, each in found["exactness"].items()]
    lines += ["", *(f"Missed: {line}" for line in found["missed"])] if found["missed"] else ["", "Every bar is met."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short rounds: shows that it runs, not what it costs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, clip_rounds = (6, 10) if options.quick else (60, 100)
    found: dict[str, Any] = {
        "where": {
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": rounds,
        },
        "steps": {kind: steps(kind, rounds, 5) for kind in ("mlp", "deep", "cnn")},
        "clipping": {
            name: {
                "above": clipping(shapes, 1e-3, clip_rounds),
                "below": clipping(shapes, 1e9, clip_rounds),
            }
            for name, shapes in SHAPES.items()
        },
        "exactness": {kind: {str(k): exactness(kind, k) for k in (2, 4, 16)} for kind in ROWS},
    }
    found["missed"] = missed(found)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"step-{found['where']['date']}"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(as_markdown(found))
    print(as_markdown(found))
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
