"""What `gradctl.off` costs: per operation, per turn, and over 100,000 turns beside threads that train.

    python benchmarks/off.py [--quick] [--out DIR]

Everything runs in one process, the variants interleaved in random order in every round; times are CPU time of the
calling thread (`time.thread_time_ns`). A ratio is the median over rounds of the ratio within a round. Beside it stands
the A/A spread: how far from 1 the same median is for `no_grad` against a second run of `no_grad`, which is noise alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import random
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradctl

RESULTS = Path(__file__).parent / "results"
AIM_RATIO = 1.02
AIM_TURN_US = 30.0
AIM_TURNS = 100_000


class Block(nn.Module):
    """One GPT block: width 64, 4 heads, 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, [batch, tokens, 64]."""
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, 4, width // 4).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class Double(torch.autograd.Function):
    """A Python autograd.Function."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return 2 x."""
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return twice the gradient."""
        return grads[0] * 2


def operations() -> dict[str, tuple[Callable[[], object], int]]:
    """Return each operation and how often to repeat it within one timing."""
    torch.manual_seed(0)
    a, x = torch.ones(4, requires_grad=True), torch.randn(1, 16)
    linear, image, conv = nn.Linear(16, 16), torch.randn(1, 3, 16, 16), nn.Conv2d(3, 8, 3)
    mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    block, tokens = Block(), torch.randn(1, 16, 64)
    return {
        "add": (lambda: a + a, 2000),
        "view": (lambda: a.view(2, 2), 2000),
        "linear": (lambda: linear(x), 1000),
        "Function.apply": (lambda: Double.apply(a), 500),
        "MLP": (lambda: mlp(x), 300),
        "conv": (lambda: conv(image), 200),
        "GPT block": (lambda: block(tokens), 30),
    }


MODES: dict[str, Callable[[], Any]] = {
    "on": contextlib.nullcontext,
    "off": gradctl.off,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "no_grad again": torch.no_grad,
}


def per_operation(rounds: int, rng: random.Random) -> dict[str, Any]:
    """Time every operation under every mode; ns per call."""
    found: dict[str, Any] = {}
    for name, (call, repeats) in operations().items():
        samples: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode in rng.sample(list(MODES), len(MODES)):
                with MODES[mode]():
                    for _ in range(repeats // 10):
                        call()
                    begin = time.thread_time_ns()
                    for _ in range(repeats):
                        call()
                    samples[mode].append((time.thread_time_ns() - begin) / repeats)
        ns = {mode: statistics.median(values) for mode, values in samples.items()}
        found[name] = {
            "ns": {mode: round(value, 1) for mode, value in ns.items()},
            "off_over_no_grad": ratio(samples["off"], samples["no_grad"]),
            "off_over_inference_mode": ratio(samples["off"], samples["inference_mode"]),
            "spread": round(abs(ratio(samples["no_grad again"], samples["no_grad"]) - 1), 4),
        }
    return found


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median over rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 4)


def turns(rounds: int) -> dict[str, Any]:
    """Time entering and leaving after the first use; microseconds."""
    begin = time.thread_time_ns()
    with gradctl.off():
        pass
    first = (time.thread_time_ns() - begin) / 1e3
    samples: list[float] = []
    for _ in range(rounds):
        begin = time.thread_time_ns()
        for _ in range(200):
            with gradctl.off():
                pass
        samples.append((time.thread_time_ns() - begin) / 200 / 1e3)
    halves = [statistics.median(samples[start::2]) for start in (0, 1)]
    return {
        "first_in_this_process_us": round(first, 1),
        "median_us": round(statistics.median(samples), 2),
        "spread": round(abs(halves[0] / halves[1] - 1), 4),
    }


def resident_bytes() -> int:
    """Return the memory that this process has in use now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def endurance(count: int) -> dict[str, Any]:
    """Turn the switch `count` times beside three threads that train, one of which compiles; what is left of it."""
    stop, first_steps = threading.Event(), threading.Barrier(4)
    outcome: list[dict[str, int]] = [{"steps": 0, "refused": 0, "torn": 0, "other": 0} for _ in range(3)]
    strange: list[str] = []

    def train(index: int) -> None:
        model: Any = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        forward = torch.compile(model, backend="aot_eager") if index == 0 else model
        batch = torch.randn(8, 16)
        waited = False
        while not stop.is_set():
            try:
                optimizer.zero_grad()
                forward(batch).square().mean().backward()
                optimizer.step()
                outcome[index]["steps"] += 1
            except gradctl.BackwardRefused:
                outcome[index]["refused"] += 1
            except gradctl.TornStep:
                outcome[index]["torn"] += 1
            except RuntimeError as error:
                known = "does not require grad" in str(error)
                outcome[index]["torn" if known else "other"] += 1
                if not known and len(strange) < 5:
                    strange.append(str(error).splitlines()[0])
            if not waited:
                waited = True
                first_steps.wait()

    threads = [threading.Thread(target=train, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    first_steps.wait()
    for _ in range(200):
        with gradctl.off():
            pass
    gc.collect()
    objects, resident, begin = len(gc.get_objects()), resident_bytes(), time.monotonic()
    done = 0
    for _ in range(count):
        with gradctl.off(drain_seconds=60):
            done += 1
    seconds = time.monotonic() - begin
    stop.set()
    for thread in threads:
        thread.join()
    gc.collect()
    leaf = torch.ones(1, requires_grad=True)
    (leaf * 2).sum().backward()
    return {
        "turns": done,
        "seconds": round(seconds, 1),
        "object_growth": len(gc.get_objects()) - objects,
        "resident_growth_mib": round((resident_bytes() - resident) / 2**20, 2),
        "records_afterwards": leaf.grad is not None and not gradctl.is_off(),
        "steps": sum(each["steps"] for each in outcome),
        "refused_backwards": sum(each["refused"] for each in outcome),
        "cut_steps": sum(each["torn"] for each in outcome),
        "other_errors": sum(each["other"] for each in outcome),
        "what_errors": strange,
    }


def machine() -> dict[str, Any]:
    """Name the hardware and what ran."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradctl": gradctl.__version__,
        "threads": torch.get_num_threads(),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """Write the result as a page."""
    about, turn, long = result["machine"], result["turn"], result["endurance"]
    lines = [
        f"# gradctl.off, {result['date']}",
        "",
        f"{about['cpu']}, {about['cores']} cores (load {about['load'][0]}), {about['system']}, "
        f"Python {about['python']}, torch {about['torch']}, {about['threads']} thread; "
        f"CPU time, interleaved, medians of {result['rounds']} rounds.",
        "",
        f"## Per operation (ns; aim: off <= {AIM_RATIO} x no_grad)",
        "",
        "| operation | on | off | no_grad | inference_mode | off / no_grad | A/A spread | off / inference_mode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["operations"].items():
        ns = row["ns"]
        lines.append(
            f"| {name} | {ns['on']:.0f} | {ns['off']:.0f} | {ns['no_grad']:.0f} | {ns['inference_mode']:.0f} "
            f"| {row['off_over_no_grad']:.3f} | {row['spread']:.3f} | {row['off_over_inference_mode']:.3f} |"
        )
    lines += [
        "",
        f"## One turn, off and on again (aim: <= {AIM_TURN_US:.0f} us after the first)",
        "",
        f"{turn['median_us']} us (A/A spread {turn['spread']:.3f}); the first in the process "
        f"{turn['first_in_this_process_us'] / 1e3:.1f} ms.",
        "",
        f"## {long['turns']:,} turns beside three training threads, one of them compiling (aim: {AIM_TURNS:,})",
        "",
        f"{long['seconds']} s; objects {long['object_growth']:+d}; "
        f"resident memory {long['resident_growth_mib']:+.2f} MiB; "
        f"training works afterwards: {'yes' if long['records_afterwards'] else 'NO'}.",
        f"Meanwhile {long['steps']:,} steps were done, {long['refused_backwards']:,} backwards refused, "
        f"{long['cut_steps']:,} steps stopped because the switch had cut them, {long['other_errors']} other errors"
        + (f" ({'; '.join(long['what_errors'])})." if long["what_errors"] else "."),
        "",
        "This thread does nothing but turn the switch; a program turns it between phases.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write `off-<date>.json` and `.md`, print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds: shows that it runs, not what it costs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # the torn steps of `endurance` are counted, not told one by one
    rounds, count = (5, 500) if options.quick else (41, AIM_TURNS)
    result = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "rounds": rounds,
        "turn": turns(rounds),
        "operations": per_operation(rounds, random.Random(0)),
        "endurance": endurance(count),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"off-{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    page = as_markdown(result)
    stem.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
