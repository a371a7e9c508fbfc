"""What `fit` returns: a choice for every segment of a model's forward, to JSON and back, applied and undone."""

from __future__ import annotations

import hashlib
import html
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import Module

from gradctl._errors import PlanMismatch, UsageError
from gradctl._fit._forward import AppliedPlan
from gradctl._recompute import RegionPlan, Verify

SCHEMA: Final = "gradctl.plan/1"
_NAME = re.compile(r"^(\w+)\.(\w+)\.(\w+)$")


@dataclass(frozen=True, slots=True)
class Region:
    """What a plan does with one segment.

    Args:
        name: the module that begins it; empty for what lies between modules.
        saved_bytes: what the plain program would keep of it.
        kept_bytes: what the plan keeps.
        operations: how many operations it has, and how many are called again.
        seconds: what calling them again takes.
        engine: "replay", or "keep" where nothing is made again.
    """

    name: str
    saved_bytes: int
    kept_bytes: int
    operations: tuple[int, int]
    seconds: float
    engine: str


@dataclass(frozen=True)
class Plan:
    """What to keep, to pack and to make again in a model's forward, so that a step stays within a byte budget.

    Args:
        budget: bytes that the step may have alive at once, weights, gradients, optimizer state and inputs included.
        standing: bytes of those that were there before the step.
        predicted_peak: bytes, standing included.
        plain_peak: bytes that the plain step is predicted to need, standing included.
        predicted_slowdown: time of a step over that of the plain one.
        regions: what happens in each segment, in order.
        frontier: pairs of a budget in bytes and the slowdown that it costs, from the smallest budget that works.
        calls: for each kind of call of the model the operations expected, and what to do.
        kinds: for each of them a digest of its shapes, dtypes and modes.
        model: names and shapes of the model's parameters.
        verify: what of a dropped result is compared with what is made again.
        measured_peak: bytes that a step under the plan had alive, standing included; None before that was measured.
        remarks: what a reader must know besides.
        levers: what is done beside keeping, packing and making again: "head".
    """

    budget: int
    standing: int
    predicted_peak: int
    plain_peak: int
    predicted_slowdown: float
    regions: tuple[Region, ...]
    frontier: tuple[tuple[int, float], ...]
    calls: tuple[RegionPlan, ...]
    kinds: tuple[str, ...]
    model: tuple[tuple[str, tuple[int, ...]], ...]
    verify: Verify = "full"
    measured_peak: int | None = None
    remarks: tuple[str, ...] = ()
    levers: tuple[str, ...] = ()
    _applied: list[AppliedPlan] = field(default_factory=list[AppliedPlan], compare=False, repr=False)

    @property
    def drops_nothing(self) -> bool:
        """Whether the plain program fits the budget already."""
        return not self.levers and not any(call.drop or call.pack for call in self.calls)

    def apply(self, model: Module) -> Plan:
        """Put the plan to work in a model: its `forward` is wrapped, in this instance, until `undo`.

        Args:
            model: the model that the plan was made for, or one of the same make.

        Raises:
            PlanMismatch: its parameters differ from those that the plan was made for; names the first that does.
        """
        _compare(self.model, parameters_of(model))
        if not self.drops_nothing:
            self._applied.append(
                AppliedPlan(
                    model, dict(zip(self.kinds, self.calls, strict=True)), self.verify, head="head" in self.levers
                )
            )
        return self

    def undo(self) -> None:
        """Give every model that this plan was applied to its own forward back."""
        while self._applied:
            self._applied.pop().remove()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `gradctl.plan/1` writes it."""
        return {
            "schema": SCHEMA,
            "budget": self.budget,
            "standing": self.standing,
            "predicted_peak": self.predicted_peak,
            "plain_peak": self.plain_peak,
            "predicted_slowdown": self.predicted_slowdown,
            "measured_peak": self.measured_peak,
            "verify": self.verify,
            "remarks": list(self.remarks),
            "levers": list(self.levers),
            "model": [[name, list(shape)] for name, shape in self.model],
            "frontier": [list(point) for point in self.frontier],
            "regions": [
                {
                    "name": r.name,
                    "saved_bytes": r.saved_bytes,
                    "kept_bytes": r.kept_bytes,
                    "operations": list(r.operations),
                    "seconds": r.seconds,
                    "engine": r.engine,
                }
                for r in self.regions
            ],
            "calls": [
                {
                    "functions": [str(function) for function in call.functions],
                    "note": sorted(call.note),
                    "drop": sorted(map(list, call.drop)),
                    "pack": sorted([*maker, codec] for maker, codec in (call.pack or {}).items()),
                    "cuts": list(call.cuts),
                    "digest": _digest(call),
                    "kind": kind,
                }
                for kind, call in zip(self.kinds, self.calls, strict=True)
            ],
        }

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Read what `to_json` wrote; nothing in it is executed.

        Raises:
            UsageError: it is no plan, or was changed by hand.
        """
        try:
            if data["schema"] != SCHEMA:
                raise UsageError(f"the plan's schema is {data['schema']!r}", fix=f"this gradctl reads {SCHEMA!r}")
            return Plan(
                budget=int(data["budget"]),
                standing=int(data["standing"]),
                predicted_peak=int(data["predicted_peak"]),
                plain_peak=int(data["plain_peak"]),
                predicted_slowdown=float(data["predicted_slowdown"]),
                measured_peak=None if data["measured_peak"] is None else int(data["measured_peak"]),
                verify=_one_of(data["verify"], ("full", "sample", "off")),
                remarks=tuple(map(str, data["remarks"])),
                levers=tuple(_one_of(lever, ("head",)) for lever in data.get("levers", ())),
                model=tuple((str(name), tuple(map(int, shape))) for name, shape in data["model"]),
                frontier=tuple((int(budget), float(slowdown)) for budget, slowdown in data["frontier"]),
                regions=tuple(
                    Region(
                        str(r["name"]),
                        int(r["saved_bytes"]),
                        int(r["kept_bytes"]),
                        (int(r["operations"][0]), int(r["operations"][1])),
                        float(r["seconds"]),
                        str(r["engine"]),
                    )
                    for r in data["regions"]
                ),
                calls=tuple(_call(call) for call in data["calls"]),
                kinds=tuple(str(call["kind"]) for call in data["calls"]),
            )
        except UsageError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as fault:
            raise UsageError(
                "this is no plan of gradctl",
                what=f"{type(fault).__name__}: {fault}",
                why="a field is missing or of the wrong type",
                fix="make it again: gradctl fit SCRIPT --memory SIZE -o plan.json",
            ) from fault

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            UsageError: the file is not JSON, or is no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise UsageError(
                f"{path} cannot be read as a plan", what=str(fault), fix="pass the file of fit -o"
            ) from fault
        return Plan.from_json(data)

    def __str__(self) -> str:
        lines = [
            f"plan for {in_words(self.budget)}: predicted peak {in_words(self.predicted_peak)}"
            + (f", measured {in_words(self.measured_peak)}" if self.measured_peak is not None else "")
            + f" (plain {in_words(self.plain_peak)}), {self.predicted_slowdown:.2f} x the time"
        ]
        if self.drops_nothing:
            lines.append("  the plain program fits: nothing is dropped")
        if "head" in self.levers:
            lines.append("  the gradient of the cross-entropy is written in place")
        lines += _merged(self.regions)
        if self.frontier:
            lines.append("  budget     time")
            lines += [f"  {in_words(budget):>9}  {slowdown:.2f} x" for budget, slowdown in self.frontier]
        lines += [f"  {remark}" for remark in self.remarks]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def in_words(nbytes: int) -> str:
    """Write bytes as a person reads them: `1.25 GiB`."""
    size, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.4g} {unit}"


def parameters_of(model: Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return names and shapes of a model's parameters."""
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


def _compare(planned: Sequence[Any], found: Sequence[Any]) -> None:
    for (name, shape), (other, other_shape) in zip(planned, found, strict=False):
        if name != other or shape != other_shape:
            raise PlanMismatch(
                f"this plan was made for a model with {name} {list(shape)}",
                what=f"in its place this model has {other} {list(other_shape)}",
                fix="make a plan for this model: gradctl.fit(model, step, memory=...)",
            )
    if len(planned) != len(found):
        longer, has = (planned, "the plan's") if len(planned) > len(found) else (found, "this")
        raise PlanMismatch(
            f"this plan was made for a model with {len(planned)} parameters, this one has {len(found)}",
            what=f"{longer[min(len(planned), len(found))][0]} is in {has} model only",
            fix="make a plan for this model: gradctl.fit(model, step, memory=...)",
        )


def _merged(regions: Sequence[Region]) -> list[str]:
    """Return a line for each run of regions that are alike."""
    lines: list[str] = []
    begin = 0
    while begin < len(regions):
        first = regions[begin]
        end = begin
        while end + 1 < len(regions) and _like(first) == _like(regions[end + 1]):
            end += 1
        name = first.name or "(between)"
        if end > begin:
            name = f"{name} … {regions[end].name}"
        called, of = first.operations[1], first.operations[0]
        lines.append(
            f"  {name:<32} keeps {in_words(first.kept_bytes):>9} of {in_words(first.saved_bytes):>9}"
            + (f", makes {called} of {of} operations again" if called else "")
        )
        begin = end + 1
    return lines


def _like(region: Region) -> tuple[Any, ...]:
    pattern = re.sub(r"\d+", "*", region.name)
    return pattern, region.saved_bytes, region.kept_bytes, region.operations


def _digest(call: RegionPlan) -> str:
    text = repr(
        (
            [str(f) for f in call.functions],
            sorted(call.note),
            sorted(call.drop),
            sorted((call.pack or {}).items()),
            call.cuts,
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _call(data: Mapping[str, Any]) -> RegionPlan:
    call = RegionPlan(
        functions=tuple(map(str, data["functions"])),
        note=frozenset(int(at) for at in data["note"]),
        drop=frozenset((int(at), int(output)) for at, output in data["drop"]),
        pack={(int(at), int(output)): _one_of(codec, ("bits", "int16")) for at, output, codec in data["pack"]},
        cuts=tuple(int(at) for at in data["cuts"]),
    )
    if _digest(call) != data["digest"]:
        raise UsageError(
            "this plan was changed by hand",
            what="the digest of its operations differs from the one that was written",
            fix="make it again: gradctl fit SCRIPT --memory SIZE -o plan.json",
        )
    return replace(call, functions=tuple(map(_operation, call.functions)))


def _operation(name: str) -> Any:
    """Return an operation by its name; one that this torch does not have is a name that never matches."""
    match = _NAME.match(name)
    if match is None:
        raise ValueError(f"{name!r} is no operation")
    space, operation, overload = match.groups()
    try:
        found = getattr(getattr(getattr(torch.ops, space), operation), overload)
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        warnings.warn(f"the plan names {name}, which this torch does not have", stacklevel=2)
        return name
    return found


def _one_of(value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is not one of {known}")
    return value
