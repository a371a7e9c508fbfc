"""What `gradctl.check` costs and finds, next to one gradient of the same function and to torch's gradcheck.

    python benchmarks/check.py [--quick] [--out DIR]

Cost: each arm is called in turn in one process, the order turned round from round to round, and its CPU time is divided
by that of one gradient (forward and backward) of the same function in float64 in the same round, which is what a check
needs; the gradient in float32 stands beside it. A second arm that takes the float64 gradient gives the A/A spread,
which is noise alone.

Finding: faults are planted in the backward of a linear layer, one at a time, each for 50 seeds of data and directions;
`gradctl.check` must name the tensor, and what torch's gradcheck says in its slow and fast mode stands beside it.
Results are written to `benchmarks/results/check-<date>.json` and `.md`; the exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradctl

RESULTS = Path(__file__).parent / "results"
CHECK = "gradctl.check"
PLAIN = "one gradient, float64"
FAST = "torch gradcheck, fast mode"
COST_BAR = 12.0
FOUND_BAR = 49
SEEDS = 50


# -- what is checked --------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Two causal blocks with embedding and head: 80 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 160, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 3, nn.LayerNorm(48), enable_nested_tensor=False)
        self.head = nn.Linear(48, 100)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.body(self.table(x)))


def subjects(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], list[nn.Parameter]]]:
    """Return functions, their inputs and their parameters: about 80 thousand numbers to differentiate by."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 240), nn.ReLU(), nn.Linear(240, 10))
    y = torch.randint(0, 10, (128,))
    cnn = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)),
    )
    images, labels = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
    words, model = torch.randint(0, 100, (8, 32)), Transformer()
    rows, wide = torch.randn(128, 64, dtype=dtype), torch.randn(82_000, dtype=dtype)
    images = images.to(dtype)
    for each in (mlp, cnn, model):
        each.to(dtype)
    return {
        "82 000 inputs, pointwise": (lambda x: (x.tanh() * x.sin()).square().sum(), (wide,), []),
        "MLP": (lambda x: cross_entropy(mlp(x), y), (rows,), list(mlp.parameters())),
        "CNN with BatchNorm": (lambda x: cross_entropy(cnn(x), labels), (images,), list(cnn.parameters())),
        "transformer": (
            lambda x: cross_entropy(model(x).flatten(0, 1), words.flatten()),
            (words,),
            list(model.parameters()),
        ),
        "MLP, outputs": (mlp, (rows,), list(mlp.parameters())),
    }


# -- cost -------------------------------------------------------------------------------------------------------------


def gradient(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], params: list[nn.Parameter]) -> None:
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = fn(*leaves)
    torch.autograd.grad(out, [x for x in leaves if x.requires_grad] + params, torch.ones_like(out))


def checked(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], params: list[nn.Parameter]) -> None:
    found = gradctl.check(fn, inputs)
    assert found == [], found


def torch_fast(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], params: list[nn.Parameter]) -> None:
    """Call gradcheck with the inputs only: it does not reach parameters."""
    leaves = [x.double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.autograd.gradcheck(fn, leaves, fast_mode=True)


def cpu_seconds(run: Callable[[], None], times: int) -> float:
    begin = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - begin) / times


def cost(rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    singles = subjects(torch.float32)
    for name, subject in subjects(torch.float64).items():
        single = singles[name]
        arms: dict[str, Callable[[], None]] = {
            PLAIN: lambda s=subject: gradient(*s),
            f"{PLAIN} again (A/A)": lambda s=subject: gradient(*s),
            "one gradient, float32": lambda s=single: gradient(*s),
            CHECK: lambda s=single: checked(*s),
        }
        if not subject[2]:
            arms[FAST] = lambda s=subject: torch_fast(*s)
        for run in arms.values():
            run()
        once = cpu_seconds(arms[PLAIN], 3)
        counts = {arm: max(1, round((0.15 if arm.startswith("one") else 0.0) / once)) for arm in arms}
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(rounds):
            for arm in list(arms) if number % 2 == 0 else list(arms)[::-1]:
                times[arm].append(cpu_seconds(arms[arm], counts[arm]))
        plain = times[PLAIN]
        results[name] = {
            "numbers": sum(p.numel() for p in subject[2]) + sum(x.numel() for x in subject[1] if x.is_floating_point()),
            "gradient_ms": round(1e3 * statistics.median(plain), 2),
            "arms": {
                arm: {
                    "ratio": round(statistics.median(ratios := [a / b for a, b in zip(t, plain, strict=True)]), 3),
                    "low": round(min(ratios), 3),
                    "high": round(max(ratios), 3),
                }
                for arm, t in times.items()
            },
        }
        print(name, "done", file=sys.stderr)
    return results


# -- planted faults ---------------------------------------------------------------------------------------------------

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _one_element(w: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    w = w.clone()
    w[3, 7] = change(w[3, 7])
    return w


FAULTS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Grads]]] = {
    "none (a right backward)": ("", lambda x, w, b: (x, w, b)),
    "factor 2": ("w", lambda x, w, b: (x, 2 * w, b)),
    "mean for sum": ("b", lambda x, w, b: (x, w, b / 8)),
    "transposed": ("w", lambda x, w, b: (x, w.T.contiguous(), b)),
    "bias None": ("b", lambda x, w, b: (x, w, None)),
    "1 % off": ("w", lambda x, w, b: (x, 1.01 * w, b)),
    "sign of one element of 256": ("w", lambda x, w, b: (x, _one_element(w, torch.neg), b)),
    "one element of 256 is 1 % off": ("w", lambda x, w, b: (x, _one_element(w, lambda e: 1.01 * e), b)),
    "1e-5 relative": ("w", lambda x, w, b: (x, (1 + 1e-5) * w, b)),
    "noise of 1e-6": ("w", lambda x, w, b: (x, w + 1e-6 * torch.randn_like(w), b)),
}


def faulty(change: Callable[[Tensor, Tensor, Tensor], Grads]) -> Callable[..., Tensor]:
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w.T + b

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Grads:
            x, w = ctx.saved_tensors
            return change(g @ w, g.T @ x, g.sum(0))

    return lambda x, w, b: Linear.apply(x, w, b)


def by_torch(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, fast: bool) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaves = [x.double().requires_grad_() for x in inputs]
        try:
            torch.autograd.gradcheck(fn, leaves, fast_mode=fast)
        except RuntimeError:  # the message of a mismatch; GradcheckError is one
            return True
    return False


def faults(seeds: int, slow_seeds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, (culprit, change) in FAULTS.items():
        fn = faulty(change)
        counts = {CHECK: 0, "fast": 0, "slow": 0}
        for seed in range(seeds):
            torch.manual_seed(seed)
            inputs = torch.randn(8, 16), torch.randn(16, 16), torch.randn(16)
            names = [each for finding in gradctl.check(fn, inputs, seed=seed) for each in finding.parameters]
            counts[CHECK] += names == [culprit] if culprit else names != []
            counts["fast"] += by_torch(fn, inputs, fast=True)
            if seed < slow_seeds:
                counts["slow"] += by_torch(fn, inputs, fast=False)
        results[name] = counts
        print(name, counts, file=sys.stderr)
    return results


# -- results ----------------------------------------------------------------------------------------------------------


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def missed(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{name}: {each['arms'][CHECK]['ratio']:.2f} gradients > {COST_BAR}"
        for name, each in found["cost"].items()
        if each["arms"][CHECK]["ratio"] > COST_BAR
    ]
    seeds = found["where"]["seeds"]
    for name, counts in found["faults"].items():
        if not FAULTS[name][0]:
            lines += [f"{counts[CHECK]} false alarms"] if counts[CHECK] else []
        elif counts[CHECK] < seeds * FOUND_BAR / SEEDS:
            lines.append(f"{name}: found at {counts[CHECK]} of {seeds} seeds")
    return lines


def as_markdown(found: dict[str, Any]) -> str:
    where = found["where"]
    lines = [
        f"# What a check costs and finds, {where['date']}",
        "",
        f"{where['processor']}, {where['cores']} cores, load {where['load']}; torch {where['torch']}, Python "
        f"{where['python']}, one thread. CPU time / one float64 gradient, median of {where['rounds']} "
        f"interleaved rounds in one process (lowest to highest). Bar: {COST_BAR:g}.",
        "",
        "| function | numbers | one gradient, ms | again (A/A) | float32 gradient | gradctl.check | gradcheck, fast |",
        "|--|--|--|--|--|--|--|",
    ]
    for name, each in found["cost"].items():
        arms = each["arms"]
        cells = [
            f"{a['ratio']:.2f} ({a['low']:.2f} to {a['high']:.2f})" if a else "inputs only"
            for a in map(arms.get, (f"{PLAIN} again (A/A)", "one gradient, float32", CHECK, FAST))
        ]
        lines.append(f"| {name} | {each['numbers']} | {each['gradient_ms']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Faults planted in a linear layer (16 to 16, batch 8): seeds of {where['seeds']} at which the check names "
        f"exactly the faulty tensor, and at which torch's gradcheck fails ({where['slow_seeds']} seeds in slow mode). "
        f"Bar: {FOUND_BAR} of {SEEDS}.",
        "",
        "| fault | gradctl.check | gradcheck, fast mode | gradcheck, slow mode |",
        "|--|--|--|--|",
    ]
    lines += [f"| {name} | {c[CHECK]} | {c['fast']} | {c['slow']} |" for name, c in found["faults"].items()]
    lines += ["", *(f"MISSED: {line}" for line in found["missed"]), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and seeds; the bars are still held")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, seeds, slow_seeds = (3, 10, 2) if options.quick else (15, SEEDS, 10)
    found: dict[str, Any] = {
        "where": {
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": rounds,
            "seeds": seeds,
            "slow_seeds": slow_seeds,
        },
        "cost": cost(rounds),
        "faults": faults(seeds, slow_seeds),
    }
    found["missed"] = missed(found)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"check-{found['where']['date']}{'-quick' if options.quick else ''}"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(found)
    (options.out / f"{name}.md").write_text(text)
    print(text)
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
