"""What a freeze costs in a step, next to `requires_grad_(False)` written by hand, and what frozen rows cost.

    python benchmarks/freeze.py [--quick] [--out DIR]

All arms run in one process, one block a round in turned order; the CPU time of each is divided by that of its baseline
in the same round, and the median over the rounds is told. Two baseline arms give the A/A spread. That what is frozen
stands still, and that losses are those of the hand-written loop bit for bit, is checked as well. Results are written to
`benchmarks/results/freeze-<date>.json` and `.md`; the exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import gradctl

RESULTS = Path(__file__).parent / "results"
BARS = {"step": 1.05, "rows, AdamW": 2.0}


class Block(nn.Module):
    """Sixteen parameters in the shapes of a transformer's block, without attention's quadratic part."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, width]."""
        h = self.first(x)
        x = x + self.o(self.q(h) * torch.tanh(self.k(h)) + self.v(h))
        return x + self.down(torch.relu(self.up(self.second(x))))


class Stack(nn.Module):
    """Twelve blocks and a head: 194 parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(*(Block() for _ in range(12)))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss, shape []."""
        return self.head(self.encoder(x)).logsumexp(-1).mean()


class Table(nn.Module):
    """An embedding of 20,000 rows and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20_000, 128), nn.Linear(128, 10)

    def forward(self, index: Tensor) -> Tensor:
        """Return the loss, shape []."""
        return self.head(self.embed(index)).logsumexp(-1).mean()


def ratios(arms: dict[str, Callable[[], object]], *, baseline: str, rounds: int, steps: int) -> dict[str, float]:
    """Return the median over the rounds of each arm's CPU time by the baseline's in the same round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for call in arms.values():
        call()
    for number in range(rounds):
        spent: dict[str, float] = {}
        for name in list(arms)[:: 1 if number % 2 else -1]:
            begin = time.process_time()
            for _ in range(steps):
                arms[name]()
            spent[name] = time.process_time() - begin
        for name in arms:
            found[name].append(spent[name] / spent[baseline])
    return {name: statistics.median(values) for name, values in found.items()}


def trained(model: nn.Module, x: Tensor, *, fused: bool = False) -> Callable[[], Tensor]:
    """Return a function that trains a step with AdamW and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def whole(rounds: int) -> dict[str, float]:
    """Measure a step, and a freeze with its undoing, beside what is written by hand."""
    x = torch.randn(64, 128)
    models = {name: Stack() for name in ("hand", "A/A", "freeze", "all of it trains")}
    for name in ("hand", "A/A"):
        models[name].encoder.requires_grad_(False)
    frozen = gradctl.freeze(models["freeze"], "encoder")
    before = [p.detach().clone() for p in models["freeze"].encoder.parameters()]
    steps = {name: trained(model, x) for name, model in models.items()}
    assert all(torch.equal(steps["hand"](), steps["freeze"]()) for _ in range(3)), "losses differ"
    found = ratios(steps, baseline="hand", rounds=rounds, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, models["freeze"].encoder.parameters(), strict=True))
    frozen.remove()
    model = Stack()

    def by_hand() -> None:
        model.encoder.requires_grad_(False)
        model.encoder.requires_grad_(True)

    call = {"hand": by_hand, "freeze": lambda: gradctl.freeze(model, "encoder").remove()}
    calls = ratios(call, baseline="hand", rounds=rounds, steps=2)
    return {
        "step": found["freeze"],
        "step, A/A": found["A/A"],
        "step, all of it trains": found["all of it trains"],
        "freeze and remove": calls["freeze"],
    }


def rows(rounds: int) -> dict[str, float]:
    """Measure a step with frozen rows beside one without."""
    index = torch.randint(0, 20_000, (256,))
    found: dict[str, float] = {}
    for kind, fused in (("AdamW", False), ("fused AdamW", True)):
        for share in (0.1, 0.99):
            models = {name: Table() for name in ("without", "A/A", "rows")}
            kept = range(int(share * 20_000))
            with gradctl.freeze(models["rows"], rows={"embed.weight": kept}):
                before = models["rows"].embed.weight[: len(kept)].detach().clone()
                steps = {name: trained(model, index, fused=fused) for name, model in models.items()}
                measured = ratios(steps, baseline="without", rounds=rounds, steps=2)
                assert torch.equal(models["rows"].embed.weight[: len(kept)], before)
            found[f"rows, {kind}, {share:.0%} of 20,000"] = measured["rows"]
            found[f"rows, {kind}, {share:.0%}, A/A"] = measured["A/A"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, bars not judged, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 31
    found = whole(rounds) | rows(rounds)
    bars = {
        name: next((bar for part, bar in BARS.items() if name == part or name.startswith(f"{part},")), None)
        for name in found
    }
    bars = {name: None if "A/A" in name or "trains" in name else bar for name, bar in bars.items()}
    missed = [name for name, bar in bars.items() if bar is not None and found[name] > bar]
    lines = ["| what | ratio | bar |", "|---|---|---|"]
    lines += [f"| {name} | {ratio:.2f} | {bars[name] or ''} |" for name, ratio in found.items()]
    print("\n".join(lines))
    if options.quick:
        return 0
    about = {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"freeze-{about['date']}"
    path.with_suffix(".json").write_text(
        json.dumps({"about": about, "ratios": found, "bars": bars, "missed": missed}, indent=1)
    )
    header = f"# Freezing: CPU time as a ratio\n\n{', '.join(f'{key} {value}' for key, value in about.items())}\n\n"
    path.with_suffix(".md").write_text(header + "\n".join(lines) + "\n")
    print("missed: " + ", ".join(missed) if missed else "every bar is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
