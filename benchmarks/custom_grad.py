"""What gradients of one's own cost, next to a bare autograd.Function written by hand.

    python benchmarks/custom_grad.py [--quick] [--sizes 64,1000000] [--out DIR]

Each call is timed against the Function that a careful person would write for it today: the form with `setup_context`,
which torch.func asks for. Forward and backward of one tensor, both arms in one process, interleaved, the order turned
round from round to round; the CPU time of a block is divided by that of the peer in the same round, and the peer runs
twice, which gives the A/A spread. Beside the cost it is checked that forward gives the bits of its value on special
values in every dtype, and that both arms give the same gradient. Results are written to
`benchmarks/results/custom_grad-<date>.json` and `.md`; the exit code is 1 when a bar is missed.
"""

# ruff: noqa: D101, D102

from __future__ import annotations

import argparse
import contextlib
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
from torch import Tensor
from torch.autograd import Function

import gradctl

RESULTS = Path(__file__).parent / "results"
BAR = 1.05
Call = Callable[[Tensor], Tensor]


# -- by hand ----------------------------------------------------------------------------------------------------------


class Scaled(Function):
    @staticmethod
    def forward(x: Tensor, s: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.s = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.s, None


class ClippedNorm(Function):
    @staticmethod
    def forward(x: Tensor, most: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.most = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * (ctx.most / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1), None


class ClippedValue(Function):
    @staticmethod
    def forward(x: Tensor, most: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.most = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.clamp(-ctx.most, ctx.most), None


class Rounded(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


class Signed(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class Replaced(Function):
    @staticmethod
    def forward(value: Tensor, x: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad


class Silu(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + y * (1 - s))


class SiluKept(Function):
    @staticmethod
    def forward(x: Tensor) -> Any:
        s = torch.sigmoid(x)
        return x * s, s

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        y, s = ctx.saved_tensors
        return grad * (s + y * (1 - s))


def silu_backward(inputs: tuple[Tensor, ...], out: Tensor, grad: Tensor) -> Tensor:
    s = torch.sigmoid(inputs[0])
    return grad * (s + out * (1 - s))


def silu_kept(x: Tensor) -> Any:
    s = torch.sigmoid(x)
    y = x * s
    return y, (y, s)


def silu_kept_backward(kept: tuple[Tensor, Tensor], grad: Tensor) -> Tensor:
    y, s = kept
    return grad * (s + y * (1 - s))


silu = gradctl.custom_vjp(lambda x: x * torch.sigmoid(x), silu_backward)
silu_residual = gradctl.custom_vjp(silu_kept, silu_kept_backward, residuals="returned")
silu_twice = gradctl.custom_vjp(silu_kept, silu_kept_backward, residuals="returned", second_order="differentiate")


def by_made_up_loss(out: Tensor, grad: Tensor) -> None:
    (out * grad).sum().backward()


def arms(fixed: Tensor) -> dict[str, tuple[Call, Call]]:
    """Return each call and what people write for it."""
    return {
        "scale": (lambda x: gradctl.scale(x, 0.5), lambda x: Scaled.apply(x, 0.5)),
        "reverse": (lambda x: gradctl.reverse(x, 0.5), lambda x: Scaled.apply(x, -0.5)),
        "clip, norm": (lambda x: gradctl.clip(x, norm=1.0), lambda x: ClippedNorm.apply(x, 1.0)),
        "clip, value": (lambda x: gradctl.clip(x, value=0.5), lambda x: ClippedValue.apply(x, 0.5)),
        "straight_through": (lambda x: gradctl.straight_through(torch.round, x), lambda x: Rounded.apply(x)),
        "straight_through, clipped": (
            lambda x: gradctl.straight_through(torch.sign, x, backward="clipped"),
            lambda x: Signed.apply(x),
        ),
        "replace": (lambda x: gradctl.replace(fixed, gradient_of=x), lambda x: Replaced.apply(fixed, x)),
        "custom_vjp": (silu, lambda x: Silu.apply(x)),
        "custom_vjp, residuals": (silu_residual, lambda x: SiluKept.apply(x)[0]),
        "custom_vjp, differentiable": (silu_twice, lambda x: SiluKept.apply(x)[0]),
    }


# -- measured ---------------------------------------------------------------------------------------------------------


def measure(size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Time every call at one size."""
    torch.manual_seed(0)
    x, grad, fixed = torch.randn(size, requires_grad=True), torch.randn(size), torch.randn(size)
    found: dict[str, Any] = {}
    for name, (ours, peer) in arms(fixed).items():

        def block(call: Call, steps: int) -> float:
            begin = time.process_time()
            for _ in range(steps):
                torch.autograd.grad(call(x), x, grad)
            return time.process_time() - begin

        block(ours, 3)
        steps = max(3, int(seconds / max(block(peer, 3) / 3, 1e-7)))
        block(peer, steps)
        ratios, again, peers = [], [], []
        for number in range(rounds):
            order = ("ours", "peer", "peer again") if number % 2 == 0 else ("peer again", "peer", "ours")
            taken = {arm: block(ours if arm == "ours" else peer, steps) for arm in order}
            ratios.append(taken["ours"] / taken["peer"])
            again.append(taken["peer again"] / taken["peer"])
            peers.append(taken["peer"] / steps)
        found[name] = {
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "again": statistics.median(again),
            "peer_us": statistics.median(peers) * 1e6,
            "same_gradient": same_gradient(ours, peer, x, grad),
        }
    return found


def same_gradient(ours: Call, peer: Call, x: Tensor, grad: Tensor) -> bool:
    (one,), (other,) = (torch.autograd.grad(call(x), x, grad) for call in (ours, peer))
    return bool(torch.allclose(one, other, rtol=1e-5, atol=1e-7))


def backward_with(size: int, rounds: int, seconds: float) -> dict[str, float]:
    """Time `backward_with` against the loss that people make up."""
    x, grad = torch.randn(size, requires_grad=True), torch.randn(size)

    def block(call: Callable[[Tensor, Tensor], None], steps: int) -> float:
        begin = time.process_time()
        for _ in range(steps):
            x.grad = None
            call(x * 2, grad)
        return time.process_time() - begin

    steps = max(3, int(seconds / max(block(by_made_up_loss, 3) / 3, 1e-7)))
    ratios = []
    for number in range(rounds):
        order = (gradctl.backward_with, by_made_up_loss)
        taken = {call: block(call, steps) for call in (order if number % 2 == 0 else order[::-1])}
        ratios.append(taken[order[0]] / taken[order[1]])
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def exact() -> dict[str, bool]:
    """Say for each dtype whether forward gives the bits of its value, on special values."""
    found: dict[str, bool] = {}
    for dtype, bits in (
        (torch.float64, torch.int64),
        (torch.float32, torch.int32),
        (torch.float16, torch.int16),
        (torch.bfloat16, torch.int16),
    ):
        info = torch.finfo(dtype)
        numbers = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, info.min, info.smallest_normal, 1e-3, 100.0]
        x = torch.cat([torch.tensor(numbers).to(dtype), torch.tensor([1, -1, 3], dtype=bits).view(dtype)])
        q = x.flip(0)
        values = [
            (gradctl.stop(x), x),
            (gradctl.scale(x, 0.3), x),
            (gradctl.reverse(x), x),
            (gradctl.clip(x, norm=1.0), x),
            (gradctl.clip(x, value=1.0), x),
            (gradctl.straight_through(q, x), q),
            (gradctl.straight_through(q, x, backward="clipped"), q),
            (gradctl.replace(q, gradient_of=x), q),
        ]
        found[str(dtype)] = all(torch.equal(out.view(bits), value.view(bits)) for out, value in values)
    return found


# -- results ----------------------------------------------------------------------------------------------------------


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def missed(found: dict[str, Any]) -> list[str]:
    """Say which bars were missed."""
    lines: list[str] = []
    for size, calls in found["sizes"].items():
        for name, call in calls.items():
            if call["ratio"] > BAR:
                lines.append(f"{size} elements, {name}: {call['ratio']:.3f} > {BAR}")
            if not call["same_gradient"]:
                lines.append(f"{size} elements, {name}: the two gradients differ")
    lines += [f"{dtype}: forward is not bit for bit its value" for dtype, equal in found["exact"].items() if not equal]
    return lines


def as_markdown(found: dict[str, Any]) -> str:
    where = found["where"]
    lines = [
        f"# What gradients of one's own cost, {where['date']}",
        "",
        f"{where['processor']}, {where['cores']} cores, load {where['load']}; torch {where['torch']}, Python "
        f"{where['python']}, one thread. CPU time of forward and backward / a Function by hand with `setup_context`, "
        f"median of {where['rounds']} interleaved rounds in one process (lowest to highest); bar {BAR}.",
        "",
        "| | " + " | ".join(f"{size} elements | by hand, µs | A/A" for size in found["sizes"]) + " |",
        "|--" * (3 * len(found["sizes"]) + 1) + "|",
    ]
    for name in next(iter(found["sizes"].values())):
        cells = [
            f"{c['ratio']:.2f} ({c['low']:.2f} to {c['high']:.2f}) | {c['peer_us']:.0f} | {c['again']:.2f}"
            for c in (calls[name] for calls in found["sizes"].values())
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "`backward_with` / a made-up loss, no bar:", ""]
    lines += [
        f"- {size} elements: {r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for size, r in found["with"].items()
    ]
    lines += ["", "Forward bit for bit its value: " + ", ".join(d for d, equal in found["exact"].items() if equal), ""]
    lines += [f"Missed: {line}" for line in found["missed"]] or ["Every bar is met."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short rounds: shows that it runs, not what it costs")
    parser.add_argument("--sizes", default="64,1000000")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, seconds = (3, 0.01) if options.quick else (21, 0.1)
    sizes = [int(size) for size in options.sizes.split(",")]
    now = datetime.datetime.now(datetime.UTC)
    found: dict[str, Any] = {
        "where": {
            "date": now.strftime("%Y-%m-%d"),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": f"{os.getloadavg()[0]:.1f}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": rounds,
            "quick": options.quick,
        },
        "bar": BAR,
        "sizes": {size: measure(size, rounds, seconds) for size in sizes},
        "with": {size: backward_with(size, rounds, seconds) for size in sizes},
        "exact": exact(),
    }
    found["missed"] = missed(found)
    text = as_markdown(found)
    sys.stdout.write(text)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"custom_grad-{now:%Y-%m-%d}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
