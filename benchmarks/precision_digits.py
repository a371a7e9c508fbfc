"""What each precision learns, and what it costs: handwritten digits, 1797 rows, an MLP of 85k weights, batches of 64.

    python benchmarks/precision_digits.py            # a few minutes; writes benchmarks/results/ and the plot
    python benchmarks/precision_digits.py --quick    # shows that it runs

Four settings of optimizer and rate, the same seeds, initial weights and batches for every arm. The arms are trained
epoch by epoch in turn, so that their CPU times are those of one machine in one state. `pure bf16` is `model.bfloat16()`
with a plain optimizer: at small rates its updates round to nothing. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradctl

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PLOT = HERE.parent / "docs" / "gallery" / "precision.svg"

SETTINGS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], int]] = {
    "SGD 0.1, 40 epochs": (lambda p: torch.optim.SGD(p, lr=0.1), 40),
    "SGD 0.005, 40 epochs": (lambda p: torch.optim.SGD(p, lr=0.005), 40),
    "AdamW 1e-3, 30 epochs": (lambda p: torch.optim.AdamW(p, lr=1e-3), 30),
    "AdamW 1e-4, 30 epochs": (lambda p: torch.optim.AdamW(p, lr=1e-4), 30),
}
STALLS = ("SGD 0.005, 40 epochs", "AdamW 1e-4, 30 epochs")  # rates at which pure bf16 stops learning
PLOTTED = "SGD 0.005, 40 epochs"
ARMS = ("fp32", "fp32 again (A/A)", "bf16-autocast", "pure bf16", "bf16-master", "bf16-kahan", "bf16-stochastic")
WITHIN = 0.01  # of fp32's final loss
HELD = ("bf16-master", "bf16-stochastic")


class Arm:
    """One model in one precision, trained by the plainest loop."""

    def __init__(self, name: str, make: Callable[[Any], torch.optim.Optimizer], seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        self.dtype = torch.float32
        if name == "pure bf16":
            self.model.bfloat16()
            self.dtype = torch.bfloat16
        self.optimizer = make(self.model.parameters())
        mode: Any = name if name.startswith("bf16-") else "fp32"
        self.attached = (
            None if self.dtype is torch.bfloat16 else gradctl.precision(mode).attach(self.model, self.optimizer)
        )
        self.batches = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def epoch(self, x: Tensor, y: Tensor) -> None:
        """Train on every row once; the loss of an epoch is the mean over its batches, as they were trained on."""
        x = x.to(self.dtype)
        batches = torch.randperm(len(x), generator=self.batches).split(64)
        begin = time.process_time()
        losses = [self.step(x[rows], y[rows]) for rows in batches]
        self.seconds.append(time.process_time() - begin)
        self.losses.append(torch.stack(losses).mean().item())

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Make one step; return its loss."""
        attached = self.attached
        if attached is None:
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(x).float(), y)
            loss.backward()
            self.optimizer.step()
            return loss.detach()
        attached.zero_grad()
        with attached.forward():
            loss = cross_entropy(self.model(x), y)
        loss.backward()
        attached.collect()
        attached.step(self.optimizer)
        return loss.detach()


def learn(setting: str, epochs: int, seeds: int) -> dict[str, Any]:
    """Train all arms in turn; return curves, final losses and CPU time ratios."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    make = SETTINGS[setting][0]
    curves: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in range(seeds):
        arms = {name: Arm(name, make, seed) for name in ARMS}
        for number in range(epochs):
            for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
                arms[name].epoch(x, y)
        for name, arm in arms.items():
            curves[name].append(arm.losses)
            times[name] += arm.seconds[1:]
            if arm.attached is not None:
                arm.attached.remove()
    found: dict[str, Any] = {}
    for name in ARMS:
        each = [a / b for a, b in zip(times[name], times["fp32"], strict=True)]
        found[name] = {
            "loss": statistics.median(curve[-1] for curve in curves[name]),
            "curve": [round(statistics.median(values), 5) for values in zip(*curves[name], strict=True)],
            "cpu": round(statistics.median(each), 3),
            "ms_an_epoch": round(1e3 * statistics.median(times[name]), 2),
        }
    return found


def missed(settings: dict[str, Any]) -> list[str]:
    """Say which bars were missed."""
    lines = []
    for setting in STALLS:
        arms = settings[setting]
        wanted = arms["fp32"]["loss"]
        for name in HELD:
            off = abs(arms[name]["loss"] / wanted - 1)
            if off > WITHIN:
                lines.append(f"{setting}, {name}: {arms[name]['loss']:.4f} is {off:.1%} off fp32's {wanted:.4f}")
        if arms["pure bf16"]["loss"] < 1.2 * wanted:
            lines.append(f"{setting}: pure bf16 does not stall here")
    for setting, arms in settings.items():
        if arms["bf16-master"]["cpu"] > max(1.0, arms["fp32 again (A/A)"]["cpu"]):
            lines.append(f"{setting}, bf16-master: CPU time {arms['bf16-master']['cpu']:.2f} x fp32's")
    return lines


def as_markdown(found: dict[str, Any]) -> str:
    where, settings = found["where"], found["settings"]
    lines = [
        f"# What each precision learns on digits, {where['date']}",
        "",
        f"{where['processor']}, {where['cores']} cores, load {where['load']}; torch {where['torch']}, one thread. "
        f"Training loss of the last epoch, median of {where['seeds']} seeds; in brackets CPU time / fp32's, median of "
        "epochs in turn.",
        "",
        "| | " + " | ".join(settings) + " |",
        "|--" * (len(settings) + 1) + "|",
    ]
    for name in ARMS:
        cells = [f"{arms[name]['loss']:.4f} ({arms[name]['cpu']:.2f})" for arms in settings.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"Missed: {line}" for line in found["missed"])] if found["missed"] else ["", "Every bar is met."]
    return "\n".join(lines) + "\n"


# -- plot -------------------------------------------------------------------------------------------------------------

COLOURS = {"fp32": "#444444", "bf16-master": "#1f77b4", "bf16-kahan": "#2ca02c", "bf16-stochastic": "#ff7f0e",
           "pure bf16": "#d62728"}  # fmt: skip
DASHES = {"fp32": "", "bf16-master": "7 5", "bf16-kahan": "2 5", "bf16-stochastic": "2 3", "pure bf16": ""}


def plot(setting: str, arms: dict[str, Any]) -> str:
    """Draw the losses of one setting over its epochs."""
    width, height, left, top, right, bottom = 680, 360, 52, 34, 190, 44
    epochs = len(arms["fp32"]["curve"])
    low, high = 1.7, 2.4

    def at(epoch: int, loss: float) -> tuple[float, float]:
        across = left + (width - left - right) * epoch / (epochs - 1)
        return round(across, 1), round(
            top + (height - top - bottom) * (high - min(max(loss, low), high)) / (high - low), 1
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="12">',
        f"<title>Training loss, digits, {setting}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="13">Digits, MLP of 85k weights, {setting}: training loss</text>',
    ]
    for tick in (1.8, 2.0, 2.2, 2.4):
        x, y = at(0, tick)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{width - right}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{tick}</text>')
    for epoch in range(0, epochs, 10):
        x, _ = at(epoch, low)
        parts.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">epoch</text>')
    label_at = top + 14.0
    for name in ("pure bf16", "fp32", "bf16-master", "bf16-kahan", "bf16-stochastic"):
        points = " ".join(f"{x},{y}" for x, y in (at(e, v) for e, v in enumerate(arms[name]["curve"])))
        dash = f' stroke-dasharray="{DASHES[name]}"' if DASHES[name] else ""
        thick = 4 if name == "fp32" else 2
        faint = ' stroke-opacity="0.35"' if name == "fp32" else ""
        stroke = f'stroke="{COLOURS[name]}" stroke-width="{thick}"{faint}{dash}'
        parts.append(f'<polyline points="{points}" fill="none" {stroke}/>')
        begin = width - right + 12
        parts.append(f'<line x1="{begin}" y1="{label_at - 4}" x2="{begin + 22}" y2="{label_at - 4}" {stroke}/>')
        parts.append(f'<text x="{begin + 28}" y="{label_at}">{name} {arms[name]["loss"]:.3f}</text>')
        label_at += 20
    return "\n".join([*parts, "</svg>"]) + "\n"


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two epochs and one seed: shows that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = 1 if options.quick else 3
    settings = {
        setting: learn(setting, 2 if options.quick else epochs, seeds) for setting, (_, epochs) in SETTINGS.items()
    }
    found: dict[str, Any] = {
        "where": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": f"{os.getloadavg()[0]:.1f}",
            "torch": torch.__version__,
            "seeds": seeds,
            "quick": options.quick,
        },
        "settings": settings,
        "missed": [] if options.quick else missed(settings),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"precision_digits-{found['where']['date']}{'-quick' if options.quick else ''}"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(found)
    (options.out / f"{name}.md").write_text(text)
    if not options.quick:
        options.plot.write_text(plot(PLOTTED, settings[PLOTTED]))
    print(text)
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
