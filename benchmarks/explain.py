"""What `gradctl explain` costs while it looks, next to plain training and to torch's anomaly mode.

    python benchmarks/explain.py [--quick] [--models mlp,transformer] [--out DIR]

Each arm trains its own copy of a model, all in one process; in every round each arm runs one block, the order turned
round from round to round, and its CPU time a step is divided by that of the plain arm in the same round. Two plain arms
give the A/A spread, which is noise alone. An arm that watches starts anew for each block and takes two steps before
the clock runs: what the first steps cost is a figure of its own, for they are all that a short script has.

Beside the cost it is checked, for every arm, that nothing changed: losses, parameters and the states of the random
generators are bitwise those of plain training, and no tensor outlives 400 traced steps. Results are written to
`benchmarks/results/explain-<date>.json` and `.md`; the exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from gradctl._explain import Sentinel, Tracing
from gradctl._journal import JournalWriter
from gradctl._record import Recorder

RESULTS = Path(__file__).parent / "results"
NEVER = 1 << 40
UNTIMED = 2
BARS = {
    ("mlp", "traced"): 1.25,
    ("mlp", "traced, with numbers"): 2.0,
    ("transformer", "traced"): 1.22,
    ("transformer", "traced, with numbers"): 2.0,
}


# -- models -----------------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Four causal blocks, 128 wide, with dropout: what draws random numbers can be disturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(500, 128), nn.Parameter(torch.zeros(64, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 4, nn.LayerNorm(128), enable_nested_tensor=False)
        self.head = nn.Linear(128, 500)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        mask = nn.Transformer.generate_square_subsequent_mask(64)
        return self.head(self.body(self.table(x) + self.places, mask=mask, is_causal=True)).flatten(0, 1)


def build(kind: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a model and what computes its loss on a batch; seeded, so that two calls give the same."""
    torch.manual_seed(0)
    random.seed(0)
    if kind == "tiny":
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
        x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
    elif kind == "mlp":
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        x, y = torch.randn(256, 256), torch.randint(0, 10, (256,))
    else:
        model = Transformer()
        x, y = torch.randint(0, 500, (16, 64)), torch.randint(0, 500, (16 * 64,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


# -- arms -------------------------------------------------------------------------------------------------------------


class Arm:
    """One way to train: `step` is timed, `enter` and `leave` are not."""

    def __init__(self, kind: str) -> None:
        self.model, self.loss_of = build(kind)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.steps = 1

    def step(self) -> Tensor:
        """Make one step and return its loss."""
        self.optimizer.zero_grad()
        loss = self.loss_of()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def enter(self) -> None:
        """Get ready to be timed."""

    def leave(self) -> None:
        """Stand aside while others are timed."""

    def close(self) -> None:
        """End for good."""


class FirstRun(Arm):
    """Trains as in the first run of `gradctl explain`: under the recorder and the sentinel."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.writer = JournalWriter(Path(tempfile.mkdtemp()) / "journal.rank0.jsonl")
        self.recorder = Recorder(self.writer)
        self.sentinel = Sentinel()
        self._left = time.perf_counter()

    def enter(self) -> None:
        """Watch again, as if the time of the other arms had not passed."""
        pause = time.perf_counter() - self._left
        costs = self.recorder.costs
        if costs.first_step is not None:
            costs.first_step += pause
        for state in self.recorder.by_number.values():
            state.flush_time += pause
            if state.last_end is not None:
                state.last_end += pause
        self.recorder.install()
        self.sentinel.install()

    def leave(self) -> None:
        """Stop watching for a while."""
        self.sentinel.uninstall()
        for handle in self.recorder._handles:
            handle.remove()
        self.recorder._handles = []
        self._left = time.perf_counter()

    def close(self) -> None:
        """End the journal; what failed in our code is a failure here."""
        faults = self.sentinel.finish(None)["faults"]
        self.recorder.finish("stopped")
        self.writer.close()
        assert not faults, faults


class Traced(Arm):
    """Trains as in the traced run of `gradctl explain`."""

    def __init__(self, kind: str, *, numbers: bool) -> None:
        super().__init__(kind)
        self.numbers = numbers

    def enter(self) -> None:
        """Begin a trace; one that waits for a step far away does not look at numbers."""
        self.tracing = Tracing(script=__file__, at_step=None if self.numbers else NEVER)
        self.tracing.start()

    def leave(self) -> None:
        """End the trace; a tracer that switched itself off was not measured."""
        self.tracing.stop()
        assert not self.tracing.faults, self.tracing.faults


class Anomaly(Arm):
    """Trains in torch's anomaly mode."""

    def __init__(self, kind: str, *, check_nan: bool) -> None:
        super().__init__(kind)
        self.check_nan = check_nan

    def enter(self) -> None:
        """Switch it on."""
        torch.autograd.set_detect_anomaly(True, check_nan=self.check_nan)

    def leave(self) -> None:
        """Switch it off."""
        torch.autograd.set_detect_anomaly(False)


ARMS: dict[str, Callable[[str], Arm]] = {
    "plain": Arm,
    "plain again (A/A)": Arm,
    "first run: recorder and sentinel": FirstRun,
    "traced": lambda kind: Traced(kind, numbers=False),
    "traced, with numbers": lambda kind: Traced(kind, numbers=True),
    "anomaly mode, check_nan=False": lambda kind: Anomaly(kind, check_nan=False),
    "anomaly mode": lambda kind: Anomaly(kind, check_nan=True),
}


# -- cost -------------------------------------------------------------------------------------------------------------


def block_seconds(arm: Arm, steps: int) -> float:
    """Return the CPU seconds of one step, after the untimed ones."""
    arm.enter()
    try:
        for _ in range(UNTIMED):
            arm.step()
        begin = time.process_time()
        for _ in range(steps):
            arm.step()
        return (time.process_time() - begin) / steps
    finally:
        arm.leave()


def ratios(found: list[float], plain: list[float]) -> dict[str, float]:
    """Return the median of the ratios within a round, and the ends."""
    each = [a / b for a, b in zip(found, plain, strict=True)]
    return {
        "ratio": round(statistics.median(each), 4),
        "low": round(min(each), 4),
        "high": round(max(each), 4),
        "extra_ms": round(1e3 * statistics.median(a - b for a, b in zip(found, plain, strict=True)), 3),
    }


def compare(kind: str, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Interleave the arms of one model; return their ratios to the plain arm."""
    arms = {name: make(kind) for name, make in ARMS.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    try:
        for arm in arms.values():
            block_seconds(arm, 3)  # imports, caches, the optimizer's state
            arm.steps = max(3, math.ceil(seconds / block_seconds(arm, 3)))
        for number in range(rounds):
            for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
                times[name].append(block_seconds(arms[name], arms[name].steps))
    finally:
        for arm in arms.values():
            arm.close()
    return {
        "plain_ms": round(1e3 * statistics.median(times["plain"]), 2),
        "tensors": sum(1 for _ in arms["plain"].model.parameters()),
        "arms": {
            name: ratios(found, times["plain"]) | {"steps_a_block": arms[name].steps} for name, found in times.items()
        },
    }


def first_steps(kind: str, count: int, repeats: int) -> dict[str, Any]:
    """Time the first `count` steps of fresh models, starting and ending of the watcher included."""

    def run(make: Callable[[str], Arm]) -> float:
        arm = make(kind)
        begin = time.process_time()
        arm.enter()
        for _ in range(count):
            arm.step()
        arm.leave()
        taken = time.process_time() - begin
        arm.close()
        return taken

    for make in ARMS.values():
        run(make)
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(repeats):
        for name in list(ARMS) if number % 2 == 0 else list(ARMS)[::-1]:
            times[name].append(run(ARMS[name]))
    return {"steps": count, "arms": {name: ratios(found, times["plain"]) for name, found in times.items()}}


# -- nothing changed --------------------------------------------------------------------------------------------------


def trained(make: Callable[[str], Arm], kind: str, steps: int) -> dict[str, list[Tensor]]:
    """Train afresh in one arm; return what must not depend on who watches."""
    arm = make(kind)
    arm.enter()
    try:
        losses = [arm.step() for _ in range(steps)]
    finally:
        arm.leave()
    arm.close()
    state = random.getstate()[1]
    return {
        "losses": losses,
        "parameters": [param.detach().clone() for param in arm.model.parameters()],
        "random states": [torch.get_rng_state(), torch.tensor(state)],
    }


def same(kind: str, steps: int) -> dict[str, dict[str, bool]]:
    """Say for every arm whether losses, parameters and random states are bitwise those of the plain arm."""
    plain = trained(ARMS["plain"], kind, steps)
    found: dict[str, dict[str, bool]] = {}
    for name, make in ARMS.items():
        if name != "plain":
            seen = trained(make, kind, steps)
            found[name] = {
                what: all(_bitwise(a, b) for a, b in zip(values, plain[what], strict=True))
                for what, values in seen.items()
            }
    return found


def _bitwise(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def live_tensors() -> int:
    """Count the tensors that Python can reach."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def growth(*, numbers: bool, steps: int) -> dict[str, int]:
    """Count live tensors around `steps` traced steps, while the trace still runs and after its end."""
    arm = Traced("tiny", numbers=numbers)
    for _ in range(3):
        arm.step()
    before = live_tensors()
    arm.enter()
    for _ in range(steps):
        arm.step()
    during = live_tensors()
    arm.leave()
    return {"before": before, "while traced": during, "after": live_tensors()}


# -- results ----------------------------------------------------------------------------------------------------------


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def missed(found: dict[str, Any]) -> list[str]:
    """Say which bars were missed."""
    lines = [
        f"{kind}, {name}: {found['models'][kind]['arms'][name]['ratio']:.3f} > {bar}"
        for (kind, name), bar in BARS.items()
        if kind in found["models"] and found["models"][kind]["arms"][name]["ratio"] > bar
    ]
    lines += [
        f"{kind}, {name}: {what} are not those of plain training"
        for kind, arms in found["same"].items()
        for name, each in arms.items()
        for what, equal in each.items()
        if not equal
    ]
    for name, counts in found["live_tensors"].items():
        if len(set(counts.values())) > 1:
            lines.append(f"{name}: live tensors {counts}")
    return lines


def as_markdown(found: dict[str, Any]) -> str:
    where, models, first = found["where"], found["models"], found["first_steps"]
    lines = [
        f"# What explaining costs, {where['date']}",
        "",
        f"{where['processor']}, {where['cores']} cores, load {where['load']}; torch {where['torch']}, Python "
        f"{where['python']}, one thread. CPU time a step / plain, median of {where['rounds']} interleaved rounds in "
        "one process (lowest to highest).",
        "",
    ]
    heads = [f"{kind} ({m['tensors']} tensors, {m['plain_ms']:.1f} ms)" for kind, m in models.items()]
    heads += [f"first {f['steps']} steps, {kind}" for kind, f in first.items()]
    lines += [f"| | {' | '.join(heads)} |", "|--" * (len(heads) + 1) + "|"]
    for name in ARMS:
        cells = []
        for kind, model in models.items():
            bar = BARS.get((kind, name))
            cells.append(_cell(model["arms"][name]) + (f", bar {bar}" if bar else ""))
        cells += [_cell(each["arms"][name]) for each in first.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Losses, parameters and random states, bitwise as in plain training ({where['same_steps']} steps a model):",
        "",
        "| | " + " | ".join(found["same"]) + " |",
        "|--" * (len(found["same"]) + 1) + "|",
    ]
    for name in list(ARMS)[1:]:
        cells = [
            "yes" if all(arms[name].values()) else "NO: " + ", ".join(w for w, ok in arms[name].items() if not ok)
            for arms in found["same"].values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Live tensors around {where['traced_steps']} traced steps of a tiny network:", ""]
    for name, counts in found["live_tensors"].items():
        lines.append(f"- {name}: " + ", ".join(f"{count} {when}" for when, count in counts.items()))
    lines += ["", *(f"Missed: {line}" for line in found["missed"])] if found["missed"] else ["", "Every bar is met."]
    return "\n".join(lines) + "\n"


def _cell(arm: dict[str, float]) -> str:
    return f"{arm['ratio']:.3f} ({arm['low']:.2f} to {arm['high']:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short rounds: shows that it runs, not what it costs")
    parser.add_argument("--models", default="mlp,transformer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quick = options.quick
    rounds, seconds = (3, 0.1) if quick else (9, 1.0)
    same_steps, traced_steps = (5 if quick else 30), 400
    kinds = options.models.split(",")
    found: dict[str, Any] = {
        "where": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": f"{os.getloadavg()[0]:.1f}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": rounds,
            "same_steps": same_steps,
            "traced_steps": traced_steps,
            "quick": quick,
        },
        "live_tensors": {
            "without numbers": growth(numbers=False, steps=traced_steps),
            "with numbers": growth(numbers=True, steps=traced_steps),
        },
        "same": {kind: same(kind, same_steps) for kind in kinds},
        "models": {},
        "first_steps": {},
    }
    print("checks done", file=sys.stderr)
    for kind in kinds:
        found["models"][kind] = compare(kind, rounds=rounds, seconds=seconds)
        print(f"{kind} done", file=sys.stderr)
    if "mlp" in kinds:
        found["first_steps"]["mlp"] = first_steps("mlp", *((10, 2) if quick else (50, 7)))
    found["missed"] = missed(found)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"explain-{found['where']['date']}{'-quick' if quick else ''}"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(found)
    (options.out / f"{name}.md").write_text(text)
    print(text)
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
