"""Synthetic journals: run directories written from the documented format, not by our writer.

Each builder takes a folder, writes one run directory into it and returns that directory. They share no code with
`gradctl._journal`, so a test that reads one of them checks the reader against the format itself.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

NAN = float("nan")
STARTED = 1_795_500_600.0  # a fixed wall-clock second, so that drawings are equal from run to run
Value = float | None

HOSTILE_NAME = '<script>alert("p")</script>[bold red]x[/bold red]\x1b[31m\x07\u202e&amp;\'"'


def code(value: Value) -> int | str | None:
    """A norm as the journal spells it: hundredths of a decade, -999 zero, "nan" non-finite, null none."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "nan"
    return -999 if value == 0 else round(100 * math.log10(value))


def packed(values: Sequence[Value]) -> list[int | str | None] | str:
    """The norms of one record: a list, or above 500 tensors one byte a tensor in base64."""
    if len(values) <= 500:
        return [code(v) for v in values]
    if any(v is None for v in values):
        return base64.b64encode(bytes(byte_code(v) for v in values)).decode()
    numbers = np.array(values, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.clip(np.nan_to_num(2 + np.round(20 * (np.log10(numbers) + 8))), 2, 254)
    coded = np.where(np.isfinite(numbers), np.where(numbers == 0, 1, steps), 255)
    return base64.b64encode(coded.astype(np.uint8).tobytes()).decode()


def byte_code(value: Value) -> int:
    """One byte a norm: 0 none, 1 zero, 255 non-finite, 2..254 a twentieth of a decade from 1e-8 up."""
    if value is None:
        return 0
    if not math.isfinite(value):
        return 255
    return 1 if value == 0 else min(254, max(2, 2 + round(20 * (math.log10(value) + 8))))


def gpt(blocks: int = 4, width: int = 128) -> tuple[list[str], list[list[int]]]:
    """Names and shapes of a small GPT: 4 + 12 * `blocks` tensors."""
    found: list[tuple[str, list[int]]] = [
        ("transformer.wte.weight", [96, width]),
        ("transformer.wpe.weight", [256, width]),
    ]
    for k in range(blocks):
        at = f"transformer.h.{k}"
        for layer, shape in (
            ("ln_1", [width]),
            ("attn.c_attn", [width, 3 * width]),
            ("attn.c_proj", [width, width]),
            ("ln_2", [width]),
            ("mlp.c_fc", [width, 4 * width]),
            ("mlp.c_proj", [4 * width, width]),
        ):
            found += [(f"{at}.{layer}.weight", shape), (f"{at}.{layer}.bias", [shape[-1]])]
    found += [("transformer.ln_f.weight", [width]), ("transformer.ln_f.bias", [width])]
    return [name for name, _ in found], [shape for _, shape in found]


def plain_norms(shapes: Sequence[Sequence[int]], *, seed: int = 0) -> Callable[[int], list[Value]]:
    """Norms that differ by layer, dip early and then wander by some percent: what a healthy model shows."""
    rng = np.random.default_rng(seed)
    base = np.array([(0.3 if len(s) > 1 else 0.03) * (0.5 + rng.random()) for s in shapes])

    def at(step: int) -> list[Value]:
        noise = np.random.default_rng((seed, step)).normal(0.0, 0.12, len(base))
        return (base * np.exp(noise) * (1 + 4 * math.exp(-step / 15))).tolist()

    return at


def plain_ratios(shapes: Sequence[Sequence[int]], *, size: float = 1e-3) -> Callable[[int], list[Value]]:
    """Update over weight: `size` for matrices, ten times that for vectors, none for a tensor born at zero."""

    def at(step: int) -> list[Value]:
        rng = np.random.default_rng((7, step))
        return [size * (10 if len(s) < 2 else 1) * float(np.exp(rng.normal(0, 0.2))) for s in shapes]

    return at


def falling(first: float, last: float, *, noise: float = 0.03, seed: int = 3) -> Callable[[int], float]:
    """A loss that falls from `first` towards `last`, with relative noise."""

    def at(step: int) -> float:
        wobble = float(np.random.default_rng((seed, step)).normal(0.0, noise))
        return (last + (first - last) * math.exp(-(step - 1) / 40)) * (1 + (wobble if step > 1 else 0))

    return at


def flat(level: float, *, noise: float = 0.3, seed: int = 5) -> Callable[[int], float]:
    """A loss that goes nowhere: adversarial games and policy gradients look like this when they are healthy."""
    return lambda step: level * (1 + float(np.random.default_rng((seed, step)).normal(0.0, noise)))


@dataclass
class Trainer:
    """One optimizer of a synthetic run and what it did at each step (steps count from 1)."""

    names: list[str | None]
    shapes: list[list[int]]
    steps: int = 400
    id: int = 0
    cls: str = "AdamW"
    source: str = "optimizer"
    lr: Callable[[int], float] = lambda step: 3e-4
    loss: Callable[[int], float | None] = field(default_factory=lambda: falling(4.43, 2.45))
    norms: Callable[[int], list[Value]] | None = None
    ratios: Callable[[int], list[Value]] | None = None
    cosine: Callable[[int], float | None] = lambda step: 0.3 + 0.5 * math.exp(-step / 20)
    clip: float | None = None
    ms: Sequence[float] = (319.3, 154.8, 2.2, 0.1)
    microbatches: int = 1
    dead: float = 0.0
    dtype: str = "torch.float32"
    thread: str = "MainThread"
    rss: int = 917
    roots: list[list[Any]] = field(default_factory=lambda: [["GPT2LMHeadModel", 52]])
    main_hint: bool = False
    from_seconds: float = 1.0

    def __post_init__(self) -> None:
        self.norms = self.norms or plain_norms(self.shapes)
        self.ratios = self.ratios or plain_ratios(self.shapes)

    def total(self, step: int) -> float:
        """Norm of all gradients of one step."""
        assert self.norms is not None
        return float(np.linalg.norm([v for v in self.norms(step) if v is not None]))

    def records(self) -> list[tuple[float, dict[str, Any]]]:
        """The lines of this optimizer, each with its time in seconds."""
        numel = [math.prod(s) for s in self.shapes]
        found: list[tuple[float, dict[str, Any]]] = [
            (
                self.from_seconds - 0.01,
                {
                    "k": "opt",
                    "o": self.id,
                    "cls": self.cls,
                    "names": self.names,
                    "shapes": self.shapes,
                    "dtypes": [self.dtype] * len(self.shapes),
                    "groups": 0,
                    "lr": [self.lr(1)],
                    "numel": sum(numel),
                    "frozen": 0,
                    "thread": self.thread,
                    "named": "registration",
                    "roots": self.roots,
                    "main_hint": self.main_hint,
                    "source": self.source,
                },
            )
        ]
        found += self._blocks() + self._maxima() + self._rows()
        return found

    def _time(self, step: int) -> float:
        return round(self.from_seconds + step * self.ms[0] / 1000, 4)

    def _blocks(self) -> list[tuple[float, dict[str, Any]]]:
        found, first = [], 1
        while first <= self.steps:
            count = min(max(1, first >> 9), self.steps - first + 1)
            # long blocks are drawn from a few of their steps: the shape is what matters
            picked = sorted(
                {first + round(j * (count - 1) / 7) for j in range(8)} if count > 8 else range(first, first + count)
            )
            seen = [v for v in (self.loss(n) for n in picked) if v is not None]
            good = [v for v in seen if math.isfinite(v)]
            bad = round((len(seen) - len(good)) * count / len(picked)) if seen else 0
            block: dict[str, Any] = {
                "k": "b",
                "o": self.id,
                "n": first,
                "c": count,
                "t": self._time(first + count - 1),
                "l": [_short(math.fsum(good) / len(good)), _short(min(good)), _short(max(good))] if good else None,
                "bad": bad,
                "mb": count * self.microbatches,
                "ms": [round(float(v), 3) for v in self.ms],
            }
            totals = [self.total(n) for n in picked]
            finite = [v for v in totals if math.isfinite(v)]
            if finite:
                block["tot"] = [_short(math.fsum(finite) / len(finite)), _short(max(finite))]
            if self.clip is not None:
                before = [v * 1.5 for v in finite] or [0.0]
                over = sum(v > self.clip for v in before)
                block["clip"] = [
                    count,
                    round(over * count / len(picked)),
                    _short(max(1.0, max(before) / self.clip)),
                    self.clip,
                    _short(math.fsum(before) / len(before)),
                    _short(max(before)),
                ]
            found.append((block["t"], block))
            first += count
        return found

    def _maxima(self) -> list[tuple[float, dict[str, Any]]]:
        assert self.norms is not None
        found, first = [], 1
        while first <= self.steps:
            count = min(max(1, first >> 7), self.steps - first + 1)
            step = first + count - 1
            mx = {"k": "mx", "o": self.id, "n": step, "c": count, "g": packed(self.norms(step))}
            found.append((self._time(step), mx))
            first += count
        return found

    def _rows(self) -> list[tuple[float, dict[str, Any]]]:
        assert self.norms is not None
        assert self.ratios is not None
        found: list[tuple[float, dict[str, Any]]] = []
        step = 1
        while step <= self.steps:
            for n in (step, step + 1):
                if n > self.steps:
                    continue
                g = self.norms(n)
                row: dict[str, Any] = {
                    "k": "row",
                    "o": self.id,
                    "n": n,
                    "t": self._time(n),
                    "g": packed(g),
                    "u": packed(self.ratios(n)),
                    "tot": _number(self.total(n)),
                    "none": sum(v is None for v in g),
                    "zero": sum(v == 0 for v in g),
                    "dead": self.dead,
                    "lr": [self.lr(n)],
                    "rss": self.rss,
                }
                cosine = self.cosine(n)
                if cosine is not None and n > step:
                    row["cos"] = round(cosine, 4)
                found.append((row["t"], row))
            step += 2 + max(0 if step < 5 else 6, step >> 6)
        return found


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _number(value: float) -> float | str:
    return _short(value) if math.isfinite(value) else "nan"


def header(**changes: Any) -> dict[str, Any]:
    """A `run` record of an ordinary run."""
    return {
        "k": "run",
        "schema": "gradctl.journal/1",
        "argv": ["train.py", "--steps", "400"],
        "script": "train.py",
        "cwd": "/home/ada/project",
        "pid": 4242,
        "ppid": 4200,
        "main": True,
        "rank": 0,
        "world_size": 1,
        "host": "box",
        "started": STARTED,
        "python": "3.11.9",
        "torch": "2.13.0+cpu",
        "gradctl": "0.1.0.dev0",
        "platform": "Linux-6.1-x86_64",
        "device": "cpu",
        "threads": 2,
        "start": "run",
        "grad": "on",
        "budget": 0.01,
    } | changes


def goodbye(steps: dict[int, int], **changes: Any) -> dict[str, Any]:
    """An `end` record of an ordinary run."""
    return {
        "k": "end",
        "how": "exit",
        "code": 0,
        "exc": None,
        "steps": {str(k): v for k, v in steps.items()},
        "backwards": max(steps.values(), default=0),
        "cost": 0.92,
        "one_off": 0.08,
        "wall": 131.2,
        "share": 0.0070,
        "faults": 0,
        "dropped": {},
        "rss": 917,
        "not_seen": [],
        "bytes": 141_000,
        "children": [],
        "tiers": {"norm_every": 1, "rows": 60},
    } | changes


SAVED_BY_OP = {
    "k": "saved",
    "n": 3,
    "total": 180_192_356,
    "count": 99,
    "method": "walk",
    "rows": [
        ["MulBackward0", "transformer.h.*.mlp.act", 67_108_864, 16],
        ["ScaledDotProductFlashAttentionForCpuBackward0", "transformer.h.*.attn", 62_914_560, 24],
        ["AddmmBackward0", "transformer.h.*.attn.c_attn", 29_360_128, 16],
        ["NativeLayerNormBackward0", "transformer.h.*.ln_1", 12_582_912, 24],
        ["NativeDropoutBackward0", "transformer.h.*.attn.resid_dropout", 8_225_892, 19],
    ],
}


def write(
    directory: Path,
    trainers: Sequence[Trainer] = (),
    *,
    run: dict[str, Any] | None = None,
    end: dict[str, Any] | None = None,
    events: Sequence[tuple[float, dict[str, Any]]] = (),
    saved: dict[str, Any] | None = None,
    name: str = "journal.rank0.jsonl",
    goodbye_missing: bool = False,
) -> Path:
    """Write one journal file into `directory` (made if missing); records are ordered by time."""
    directory.mkdir(parents=True, exist_ok=True)
    run = run or header()
    timed = [r for t in trainers for r in t.records()] + list(events)
    if saved is not None:
        timed.append((2.0, saved))
    timed.sort(key=lambda pair: pair[0])
    lines = [run, *(record for _, record in timed)]
    if not goodbye_missing:
        lines.append(end or goodbye({t.id: t.steps for t in trainers}))
    path = directory / name
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")
    os.chmod(path, 0o600)
    return directory


def event(name: str, at: float, /, **fields: Any) -> tuple[float, dict[str, Any]]:
    """One `event` record and its time."""
    return at, {"k": "event", "e": name, "t": at, **fields}


def _warm_up(peak: float) -> Callable[[int], float]:
    return lambda step: peak * min(1.0, step / 30)


def healthy(root: Path, *, steps: int = 400, blocks: int = 4) -> Path:
    """A small GPT that trains well: everything reached, loss falls, the clip bites on the first steps only."""
    names, shapes = gpt(blocks)
    trainer = Trainer(list(names), shapes, steps, lr=_warm_up(3e-4), clip=6.0)
    return write(root / "healthy", [trainer], saved=SAVED_BY_OP, run=header(argv=["train.py", "--steps", str(steps)]))


def diverged(root: Path, *, steps: int = 260, bad: int = 18) -> Path:
    """Gradients overflow at step `bad`; the weights are NaN from then on."""
    names, shapes = gpt(6, 64)
    calm = plain_norms(shapes)
    spared = {5, 9, 14, 20, 31, 40, 47, 52, 58, 66, 73}

    def norms(step: int) -> list[Value]:
        if step > bad:
            return [NAN] * len(shapes)
        grown = [v * math.exp(max(0, step - bad + 6) * 0.9) if v is not None else None for v in calm(step)]
        return [NAN if step == bad and i not in spared else v for i, v in enumerate(grown)]

    def loss(step: int) -> float:
        return NAN if step > bad else 4.78 + math.exp(max(0.0, step - bad + 9))

    trainer = Trainer(
        list(names),
        shapes,
        steps,
        cls="SGD",
        loss=loss,
        norms=norms,
        lr=lambda step: 0.5,
        ms=(112.0, 60.0, 2.0, 0.5),
        ratios=lambda step: [NAN if step > bad else 0.062 if len(s) > 1 else 0.3 for s in shapes],
        cosine=lambda step: 0.9 if step <= bad else None,
    )
    hit = [i for i in range(len(shapes)) if i not in spared]
    events = [
        event(
            "nonfinite",
            1 + bad * 0.112,
            o=0,
            n=bad,
            what="grad",
            params=[names[i] for i in hit[:50]],
            count=len(hit),
            of=len(shapes),
        ),
        event("nonfinite", 1 + (bad + 1) * 0.112, o=0, n=bad + 1, what="loss", params=[], count=1, of=1),
        event(
            "nonfinite",
            1 + (bad + 1) * 0.112,
            o=0,
            n=bad + 1,
            what="weight",
            params=names[:50],
            count=len(names),
            of=len(names),
        ),
    ]
    events += [
        event("nonfinite", 1 + n * 0.112, o=0, n=n, what="grad", params=names[:50], count=len(names), of=len(names))
        for n in range(bad + 1, min(steps, bad + 60) + 1)
    ]
    run = header(argv=["broken.py"], script="broken.py")
    return write(root / "diverged", [trainer], run=run, events=events, end=goodbye({0: steps}, wall=29.1))


def gan(root: Path, *, steps: int = 300) -> Path:
    """Two optimizers that play against each other; neither loss falls and nothing is wrong."""
    sides = []
    for k, (side, width, level) in enumerate((("generator", 256, 1.1), ("discriminator", 128, 0.68))):
        names, shapes = [], []
        for layer in range(4):
            names += [f"{side}.net.{layer}.weight", f"{side}.net.{layer}.bias"]
            shapes += [[width, width], [width]]
        sides.append(
            Trainer(
                names,
                shapes,
                steps,
                id=k,
                cls="Adam",
                loss=flat(level, noise=0.25, seed=11 + k),
                lr=lambda step: 2e-4,
                norms=plain_norms(shapes, seed=20 + k),
                ms=(21.0, 5.2, 0.6, 1.1),
                roots=[[side.title(), 8]],
                rss=402,
                from_seconds=1.0 + 0.01 * k,
                cosine=lambda step: 0.05,
            )
        )
    run = header(argv=["gan.py"], script="gan.py")
    end = goodbye({0: steps, 1: steps}, backwards=2 * steps, wall=7.9, share=0.008)
    return write(root / "gan", sides, run=run, end=end)


def two_ranks(root: Path, *, steps: int = 200, late: float = 4.0) -> Path:
    """Two ranks of one data-parallel run; rank 1 reaches every backward `late` ms after rank 0."""
    directory = root / "two_ranks"
    names, shapes = gpt(2, 64)
    for rank in (0, 1):
        ms = (20.0, 6.0 + (late if rank == 0 else 0.0), 0.8, 0.4)  # the early rank waits inside backward
        loss = falling(4.2 + 0.05 * rank, 2.6 + 0.02 * rank, seed=30 + rank)
        trainer = Trainer(list(names), shapes, steps, loss=loss, ms=ms, norms=plain_norms(shapes, seed=2))
        run = header(
            argv=["ddp.py"], script="ddp.py", pid=900 + rank, rank=rank, world_size=2, started=STARTED + rank * 0.02
        )
        write(directory, [trainer], run=run, saved=SAVED_BY_OP, name=f"journal.rank{rank}.jsonl")
    return directory


def killed(root: Path, *, steps: int = 1012) -> Path:
    """The process was killed: no end record, and the last line is cut in the middle."""
    names, shapes = gpt(1, 32)
    trainer = Trainer(list(names), shapes, steps, ms=(0.4, 0.15, 0.05, 0.0), rss=240)
    directory = write(root / "killed", [trainer], run=header(argv=["long.py"], script="long.py"), goodbye_missing=True)
    with open(directory / "journal.rank0.jsonl", "ab") as file:
        file.write(b'{"k":"b","o":0,"n":1013,"c":1,"l":[2.4')
    return directory


def no_optimizer(root: Path, *, steps: int = 120) -> Path:
    """Weights are updated by hand: the backwards are the steps."""
    names, shapes = ["w1", "b1", "w2", "b2"], [[32, 64], [64], [64, 10], [10]]
    trainer = Trainer(
        list(names),
        shapes,
        steps,
        cls="backward",
        source="backward",
        ms=(1.2, 0.5, 0.0, 0.0),
        loss=falling(2.3, 0.4),
        ratios=lambda step: [None] * 4,
        roots=[],
    )
    return write(root / "no_optimizer", [trainer], run=header(argv=["by_hand.py"], script="by_hand.py"))


def empty(root: Path) -> Path:
    """The journal exists and holds nothing."""
    directory = root / "empty"
    directory.mkdir(parents=True)
    (directory / "journal.rank0.jsonl").touch(0o600)
    return directory


def hostile(root: Path, *, steps: int = 60) -> Path:
    """Every text that a program can choose tries to become markup, an escape sequence or a path."""
    shapes = [[16, 16], [16], [16, 4], [4]]
    names = [
        HOSTILE_NAME,
        "</td></table><img src=x onerror=alert(1)>",
        "[link=http://evil.example]l[/link]",
        "\x1b]0;t\x07\n\r\t",
    ]
    trainer = Trainer(list(names), shapes, steps, cls="<b>Opt</b>", thread="\x1b[2J", roots=[["<i>Net</i>", 4]])
    saved = SAVED_BY_OP | {"rows": [["<script>1</script>", "[red]m[/red]", 1 << 20, 2]], "total": 1 << 21, "count": 3}
    run = header(
        argv=["<script>alert(2)</script>", "[bold]argv[/bold]", "\x1b[41m", "javascript:alert(3)"],
        script='x"><script>alert(4)</script>.py',
        cwd="/home/<b>",
        host="<h>",
        device="</style><script>alert(5)</script>",
        torch="<torch>",
        platform="[red]p[/red]",
    )
    events = [
        event("nonfinite", 2.0, o=0, n=3, what="grad", params=names, count=4, of=4),
        event("fault", 2.1, where="<script>f</script>", trace="\x1b[31mTraceback</pre><script>alert(6)</script>"),
        event("tier_off", 2.2, tier="<b>1</b>", why="[blink]why[/blink]"),
        event("<script>alert(7)</script>", 2.3, x="y"),
    ]
    end = goodbye(
        {0: steps},
        code=1,
        not_seen=[["<script>ns</script>", "[red]because[/red]"]],
        exc={"type": "<b>E</b>", "message": "</script><script>alert(8)</script>", "file": "<f>.py", "line": 3},
    )
    return write(root / "hostile", [trainer], run=run, events=events, saved=saved, end=end)


def large(root: Path, *, tensors: int = 1000, steps: int = 100_000) -> Path:
    """As many tensors and steps as the report must stand: norms are packed one byte each."""
    names, shapes = gpt(-(-(tensors - 4) // 12), 64)
    names, shapes = names[:tensors], shapes[:tensors]
    trainer = Trainer(list(names), shapes, steps, ms=(55.0, 30.0, 3.0, 0.2))
    return write(root / "large", [trainer], saved=SAVED_BY_OP, end=goodbye({0: steps}, wall=steps * 0.055))


def never_reached(root: Path, *, steps: int = 120, lost: Sequence[int] = (49, 50, 51)) -> Path:
    """Some parameters of the optimizer never get a gradient."""
    names, shapes = gpt(4)
    calm = plain_norms(shapes)
    trainer = Trainer(
        list(names), shapes, steps, norms=lambda n: [None if i in lost else v for i, v in enumerate(calm(n))]
    )
    gone = [names[i] for i in lost]
    events = [event("none", t, o=0, n=n, params=gone, count=len(gone)) for n, t in ((3, 2.1), (steps, 60.0))]
    return write(root / "never_reached", [trainer], events=events)


def not_seen(root: Path) -> Path:
    """Training happened where we cannot listen: said so, never shown as an empty run."""
    why = ["distributed autograd", "its backward runs in C++ and no optimizer hook fires"]
    return write(
        root / "not_seen",
        run=header(argv=["rpc.py"], script="rpc.py"),
        events=[event("not_seen", 3.0, what=why[0], why=why[1])],
        end=goodbye({}, not_seen=[why], wall=4.0),
    )


def raised(root: Path, *, steps: int = 20) -> Path:
    """The script ended by its own exception."""
    names, shapes = gpt(1, 32)
    exc = {"type": "ValueError", "message": "batch of size 0", "file": "/home/ada/project/train.py", "line": 41}
    trainer = Trainer(list(names), shapes, steps)
    return write(
        root / "raised", [trainer], end=goodbye({0: steps}, code=1, exc=exc), events=[event("error", 8.0, **exc)]
    )


ALL: dict[str, Callable[[Path], Path]] = {
    "healthy": healthy,
    "diverged": diverged,
    "gan": gan,
    "two_ranks": two_ranks,
    "killed": killed,
    "no_optimizer": no_optimizer,
    "empty": empty,
    "hostile": hostile,
    "never_reached": never_reached,
    "not_seen": not_seen,
    "raised": raised,
}
