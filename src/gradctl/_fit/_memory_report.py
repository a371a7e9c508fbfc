"""What `gradctl.memory` returns: the bytes of one step as plain data, as JSON and as text."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal

from gradctl._errors import UsageError

SCHEMA: Final = "gradctl.memory/1"
Category = Literal["weights", "gradients", "optimizer state", "inputs", "saved", "temporary"]
CATEGORIES: Final[tuple[Category, ...]] = (
    "weights", "gradients", "optimizer state", "inputs", "saved", "temporary",
)  # fmt: skip
_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class SavedAt:
    """What one place saves for backward.

    Args:
        where: a module's FQN, or `file:line function`.
        nbytes: of storages that no earlier value has counted.
        count: saved values, those that share a storage included.
    """

    where: str
    nbytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Alive:
    """What is alive at the peak, by what it is and where it was made (or, if it is saved, saved).

    Args:
        category: what it is.
        module: FQN of the module, or of the parameter where it is a weight or a gradient; "" if there is none.
        line: `file:line function`; "" if there is none. What backward allocates has the line of its forward.
        nbytes: of distinct storages.
        count: of them.
    """

    category: Category
    module: str
    line: str
    nbytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Avoidable:
    """Saved bytes that backward could do without.

    Args:
        kind: `dead` (no gradient needs them), `duplicate` (equal to what is saved already) or `weight copy` (the weight
            in another dtype, saved once more).
        module: FQN; "" if there is none.
        line: `file:line function`.
        nbytes: of them.
        why: one sentence.
    """

    kind: Literal["dead", "duplicate", "weight copy"]
    module: str
    line: str
    nbytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Moment:
    """The bytes at one moment of the step, by category.

    Args:
        seconds: since its beginning; a measured step is slower than a plain one.
        phase: `forward`, `backward` or `optimizer`.
        nbytes: all of them, in the order of `CATEGORIES`.
    """

    seconds: float
    phase: str
    nbytes: tuple[int, ...]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.nbytes)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """The memory of one training step.

    Args:
        device: `cpu` or `cuda:0`: the device with the highest peak.
        peak_bytes: most bytes alive at once, what was there before included.
        start_bytes: what was there before.
        peaks: the peak of each device.
        peak_phase: `forward`, `backward` or `optimizer`.
        peak_operation: the operation that ran at the peak, as in `aten.mm.default`.
        peak_line: its line, or that of its forward; "" if there is none.
        peak_module: its module; "" if there is none.
        at_peak: bytes by category, in the order of `CATEGORIES`.
        alive: the same by place, most bytes first.
        workspace_bytes: of the temporary bytes at the peak, those that the operation has for itself.
        saved_bytes: most bytes that are saved for backward at once, without weights and inputs.
        saved_by_module, saved_by_line: the same by place, most bytes first.
        saved_values: how many values are saved.
        copied_bytes: what hooks that copy each of them would copy (`save_on_cpu`), weights and duplicates included.
        weights_saved: how many of the values are weights, or inputs: these are there anyway.
        avoidable: what of the saved bytes backward could do without.
        head_saved_bytes: saved by what comes after the last layer with weights: the loss and its softmax.
        head_peak_bytes: of the bytes at the peak, those of that layer's output and of what comes after it.
        moments: the course of the step.
        remarks: what the figures leave out.
    """

    device: str
    peak_bytes: int
    start_bytes: int
    peaks: dict[str, int]
    peak_phase: str
    peak_operation: str
    peak_line: str
    peak_module: str
    at_peak: tuple[int, ...]
    alive: tuple[Alive, ...]
    workspace_bytes: int
    saved_bytes: int
    saved_by_module: tuple[SavedAt, ...]
    saved_by_line: tuple[SavedAt, ...]
    saved_values: int
    copied_bytes: int
    weights_saved: int
    avoidable: tuple[Avoidable, ...]
    head_saved_bytes: int
    head_peak_bytes: int
    moments: tuple[Moment, ...]
    remarks: tuple[str, ...] = ()

    @property
    def dead_bytes(self) -> int:
        """Saved bytes that no gradient needs: inputs of frozen weights, and repeated copies of weights."""
        return sum(one.nbytes for one in self.avoidable if one.kind != "duplicate")

    @property
    def duplicate_bytes(self) -> int:
        """Saved bytes that equal others."""
        return sum(one.nbytes for one in self.avoidable if one.kind == "duplicate")

    def by_category(self) -> dict[Category, int]:
        """Return what is alive at the peak by what it is."""
        return dict(zip(CATEGORIES, self.at_peak, strict=True))

    def noting(self, remark: str) -> MemoryReport:
        """Return it with one remark more."""
        return replace(self, remarks=(*self.remarks, remark))

    def to_json(self) -> dict[str, Any]:
        """Return it as `gradctl.memory/1`: plain data that `json.dumps` takes."""
        return {"schema": SCHEMA, "categories": list(CATEGORIES), **json.loads(json.dumps(asdict(self)))}

    @staticmethod
    def from_json(data: dict[str, Any] | str) -> MemoryReport:
        """Read back what `to_json` has given.

        Raises:
            UsageError: it is something else.
        """
        try:
            found: Any = json.loads(data) if isinstance(data, str) else data
            if found["schema"] != SCHEMA:
                raise ValueError(f"its schema is {found['schema']!r}")
            return _read(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError("this is no memory report", why=str(error), fix=f"give it the JSON of {SCHEMA}") from error

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def size_text(nbytes: int) -> str:
    """Write bytes with three significant digits: `1.25 GiB`."""
    size, unit = float(nbytes), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1023.5:
            break
        size, unit = size / 1024, bigger
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 999.5 else f"{size:.3g} {unit}"


_ROWS: Final[dict[str, type]] = {
    "alive": Alive, "saved_by_module": SavedAt, "saved_by_line": SavedAt, "avoidable": Avoidable, "moments": Moment,
}  # fmt: skip
_KINDS: Final[dict[str, type]] = {"str": str, "int": int, "float": float}


def _read(found: dict[str, Any]) -> MemoryReport:
    values: dict[str, Any] = {}
    for one in fields(MemoryReport):
        value = found[one.name]
        if one.name in _ROWS:
            value = tuple(_row(_ROWS[one.name], row) for row in value)
        elif one.name == "peaks":
            value = {str(device): _whole(size) for device, size in value.items()}
        elif one.name == "at_peak":
            value = _counts(value)
        elif one.name == "remarks":
            value = tuple(str(remark) for remark in value)
        else:
            value = _plain(one.name, str(one.type), value)
        values[one.name] = value
    return MemoryReport(**values)


def _row(kind: Any, row: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for one in fields(kind):
        value = row[one.name]
        if one.name == "nbytes" and kind is Moment:
            values[one.name] = _counts(value)
        elif one.name == "category":
            if value not in CATEGORIES:
                raise ValueError(f"{value!r} is no category")
            values[one.name] = value
        else:
            values[one.name] = _plain(one.name, str(one.type), value)
    return kind(**values)


def _plain(name: str, kind: str, value: Any) -> Any:
    wanted = _KINDS.get(kind, str)
    if wanted is float and type(value) in (int, float):
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{name} is {type(value).__name__}, not {wanted.__name__}")
    return value


def _whole(value: Any) -> int:
    return int(_plain("a size", "int", value))


def _counts(value: Any) -> tuple[int, ...]:
    found = tuple(_whole(size) for size in value)
    if len(found) != len(CATEGORIES):
        raise ValueError(f"there are {len(found)} sizes for {len(CATEGORIES)} categories")
    return found


def _lines(report: MemoryReport) -> Iterable[str]:
    place = " ".join(filter(None, [report.peak_module, f"({report.peak_line})" if report.peak_line else ""]))
    yield (
        f"peak {size_text(report.peak_bytes)} on {report.device}, in {report.peak_phase}"
        + (f", at {report.peak_operation}" if report.peak_operation else "")
        + (f" of {place}" if place else "")
    )
    for device, peak in report.peaks.items():
        if device != report.device and peak:
            yield f"  {device}: {size_text(peak)}"
    yield f"  {'alive at the peak':<34} {'bytes':>10}"
    for category, nbytes in report.by_category().items():
        if nbytes:
            yield f"  {category:<34} {size_text(nbytes):>10}  {_share(nbytes, report.peak_bytes)}"
    if report.workspace_bytes:
        yield f"    of it inside the operation       {size_text(report.workspace_bytes):>10}"
    rows = [row for row in report.alive if row.category in ("saved", "temporary")]
    if rows:
        yield "  of saved and temporary, the largest"
        yield from _table(
            (
                (f"{row.category:<9} {' '.join(filter(None, [row.module, row.line]))}", row.nbytes)
                for row in rows[:_SHOWN]
            ),
            report.peak_bytes,
        )
    yield ""
    yield (
        f"saved for backward {size_text(report.saved_bytes)} in {report.saved_values} values "
        f"({report.weights_saved} of them are weights or inputs, which are there anyway)"
    )
    if report.saved_by_module:
        yield "  by module"
        yield from _table(((row.where, row.nbytes) for row in report.saved_by_module[:_SHOWN]), report.saved_bytes)
        yield "  by line"
        yield from _table(((row.where, row.nbytes) for row in report.saved_by_line[:_SHOWN]), report.saved_bytes)
    if report.head_saved_bytes or report.head_peak_bytes:
        yield (
            f"the loss after the last layer with weights: {size_text(report.head_saved_bytes)} saved, "
            f"{size_text(report.head_peak_bytes)} of the peak with that layer's output"
        )
    for one in report.avoidable[:_SHOWN]:
        place = " ".join(filter(None, [one.module, one.line]))
        yield f"{one.kind} {size_text(one.nbytes)}: {place}: {one.why}"
    if len(report.avoidable) > _SHOWN:
        rest = report.avoidable[_SHOWN:]
        yield f"{len(rest)} more such places, {size_text(sum(one.nbytes for one in rest))}"
    for remark in report.remarks:
        yield f"note: {remark}"


def _table(rows: Iterable[tuple[str, int]], whole: int) -> Iterable[str]:
    for where, nbytes in rows:
        if not nbytes:
            continue  # shares its storages with places above
        shown = where if len(where) <= 60 else ".." + where[-58:]
        yield f"    {shown:<60} {size_text(nbytes):>10}  {_share(nbytes, whole)}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:6.1%}" if whole else ""
