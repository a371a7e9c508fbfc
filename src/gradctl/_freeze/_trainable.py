"""`trainable`: what trains, what does not, and why."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradctl._freeze import _flags, _modes, _refusals, _rows
from gradctl._freeze._parts import keeps_statistics
from gradctl._names._patterns import named_modules, named_parameters, other_names, unwrapped

_MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class TrainableRow:
    """One parameter or buffer.

    Args:
        name: its FQN.
        kind: "parameter" or "buffer".
        shape: its shape; empty for a single number and for one that has none yet.
        num_elements: how many elements it has.
        num_trained: how many of them an optimizer may move.
        trains: whether any is.
        why: the reason, in words; empty for a parameter that trains as any other.
        tied_to: further names of the same tensor.
    """

    name: str
    kind: Literal["parameter", "buffer"]
    shape: tuple[int, ...]
    num_elements: int
    num_trained: int
    trains: bool
    why: str = ""
    tied_to: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "num_elements": self.num_elements,
            "num_trained": self.num_trained,
            "trains": self.trains,
            "why": self.why,
            "tied_to": list(self.tied_to),
        }


@dataclass(frozen=True, slots=True)
class Trainable:
    """What of a model trains, and why the rest does not; printing it shows a table, one line for what is alike.

    Args:
        model: the class of the model.
        rows: one for each parameter, in the order of `named_parameters`, and for each buffer.
        num_parameters: elements of all parameters.
        num_trained: those that an optimizer may move.
    """

    model: str
    rows: tuple[TrainableRow, ...]
    num_parameters: int
    num_trained: int

    def names(self, *, trains: bool = True) -> list[str]:
        """Return the FQNs of the parameters that train, or of those that do not."""
        return [row.name for row in self.rows if row.kind == "parameter" and row.trains is trains]

    def to_json(self) -> dict[str, Any]:
        """Return plain data: `{"schema": "gradctl.trainable/1", "model": ..., "rows": [...], ...}`."""
        return {
            "schema": "gradctl.trainable/1",
            "model": self.model,
            "num_parameters": self.num_parameters,
            "num_trained": self.num_trained,
            "rows": [row.to_json() for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [("", "elements", "trains", "why"), *self._lines()]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        shown = [
            f"{name:<{widths[0]}}  {count:>{widths[1]}}  {trains:<{widths[2]}}  {why}".rstrip()
            for name, count, trains, why in lines
        ]
        return "\n".join([*shown, self._total()])

    def _repr_html_(self) -> str:
        head = "<tr><th></th><th>elements</th><th>trains</th><th>why</th></tr>"
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in self._lines()
        )
        return f"<table>{head}{body}</table><p>{html.escape(self._total())}</p>"

    def _total(self) -> str:
        share = 100 * self.num_trained / self.num_parameters if self.num_parameters else 0.0
        return f"{self.model}: {self.num_trained:,} of {self.num_parameters:,} elements train ({share:.3g} %)"

    def _lines(self) -> Iterator[tuple[str, str, str, str]]:
        for name, group in _grouped([row for row in self.rows if row.kind == "parameter"]):
            yield _line(name, group)
        statistics = [row for row in self.rows if row.kind == "buffer" and row.why]
        for why in dict.fromkeys(row.why for row in statistics):
            alike = [row for row in statistics if row.why == why]
            names = list(dict.fromkeys(row.name.rpartition(".")[0] or row.name for row in alike))
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            yield f"{', '.join(names[:_MOST_NAMES])}{more}", f"{sum(row.num_elements for row in alike):,}", "-", why


def trainable(model: Module, *, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> Trainable:
    """Tell what of a model trains, what does not, and why.

    Reads only. Told are freezes with the line that made them, flags that somebody else has set, rows, ties, parameters
    that no optimizer holds, and running statistics that move, or stand still, beside what is frozen.

    Args:
        model: the model; also one that `torch.compile` or a data-parallel wrapper holds.
        optimizer: one or several; parameters that none of them holds do not train then.

    Returns:
        A row for each parameter and buffer; `print` shows them by module, with totals.

    Raises:
        UsageError: it is no model, or no optimizer.
    """
    _refusals.refuse_no_model(model, "trainable")
    model = unwrapped(model)
    optimizers = _refusals.optimizers_of(optimizer)
    held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]} if optimizers else None
    named = named_parameters(model)
    ties = other_names(named)
    rows: list[TrainableRow] = []
    seen: set[int] = set()
    for name, parameter in named.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            rows.append(_parameter_row(name, parameter, ties.get(name, ()), held))
    for path, module in named_modules(model).items():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                why = _statistics(module, held) if keeps_statistics(module) else ""
                full = f"{path}.{name}" if path else name
                rows.append(TrainableRow(full, "buffer", _shape(buffer), _count(buffer), 0, trains=False, why=why))
    parameters = [row for row in rows if row.kind == "parameter"]
    return Trainable(
        model=type(model).__name__,
        rows=tuple(rows),
        num_parameters=sum(row.num_elements for row in parameters),
        num_trained=sum(row.num_trained for row in parameters),
    )


def _parameter_row(name: str, parameter: Tensor, tied: tuple[str, ...], held: set[int] | None) -> TrainableRow:
    count = _count(parameter)
    flag = _flags.flag_of(parameter)
    ours = flag.holder() if flag is not None and flag.written == parameter.requires_grad else None
    rows = _rows.held_of(parameter)
    kept = rows[0].rows.count if len(rows) == 1 else count - _left(parameter, rows) if rows else 0
    reasons: list[str] = []
    trains = parameter.requires_grad
    if not parameter.is_floating_point() and not parameter.is_complex():
        reasons.append(f"{parameter.dtype} has no gradient")
    elif ours is not None:
        reasons.append(("by " if trains else "frozen by ") + str(ours))
    elif not trains:
        reasons.append("requires_grad=False, set outside of gradctl")
    elif flag is not None:
        reasons.append(f"requires_grad=True was set after {flag.holder()}")
    if trains and held is not None and id(parameter) not in held:
        trains = False
        reasons.append("not in the optimizer")
    if trains:
        reasons += dict.fromkeys(f"{one.rows.text} frozen by {one.layer}" for one in rows)  # of a tie once
    if is_lazy(parameter):
        reasons.append("no shape before the first forward")
    if tied:
        reasons.append(f"tied to {', '.join(tied)}")
    return TrainableRow(
        name, "parameter", _shape(parameter), count, count - kept if trains else 0, trains, "; ".join(reasons), tied
    )


def _statistics(module: Module, held: set[int] | None) -> str:
    """Say what running statistics do beside what is frozen; nothing where they belong to what trains."""
    ours = _modes.train_of(module)
    if ours is not None and ours.layer is not None and not module.training:
        return f"statistics stand still: {ours.layer}"
    own = list(module.parameters(recurse=False))
    frozen = bool(own) and not any(p.requires_grad and (held is None or id(p) in held) for p in own)
    return "statistics move in training mode although its parameters do not" if frozen and module.training else ""


def _left(parameter: Tensor, rows: Sequence[_rows.Held]) -> int:
    """Count the elements that are in none of several choices of rows, which may overlap."""
    left = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
    for one in rows:
        left = one.rows.zeroed(left)
    return int(left.sum())


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if is_lazy(tensor) else tuple(tensor.shape)


def _count(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel()


def _line(name: str, group: Sequence[TrainableRow]) -> tuple[str, str, str, str]:
    count, trained = sum(row.num_elements for row in group), sum(row.num_trained for row in group)
    trains = "no" if not trained and not group[0].trains else "yes" if trained == count else f"{trained:,}"
    return name or "all", f"{count:,}", trains, group[0].why


def _grouped(rows: Sequence[TrainableRow]) -> Iterator[tuple[str, list[TrainableRow]]]:
    """Yield the outermost modules in which all parameters are alike, with the parameters that have no such module."""
    alike: dict[str, set[tuple[bool, str]]] = {}
    for row in rows:
        for above in _above(row.name):
            alike.setdefault(above, set()).add((row.trains, row.why))
    groups: dict[str, list[TrainableRow]] = {}
    for row in rows:
        group = next((above for above in _above(row.name) if len(alike[above]) == 1), row.name)
        groups.setdefault(group, []).append(row)
    yield from groups.items()


def _above(name: str) -> Iterable[str]:
    """Return the names of the modules that hold `name`, from the outermost, which is "", inwards."""
    parts = name.split(".")[:-1]
    return ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
