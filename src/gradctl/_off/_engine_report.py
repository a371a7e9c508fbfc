"""What `gradctl env` says of the switch: which engine it uses here, and why."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from gradctl._off import _engines, _function_apply, _switch
from gradctl._off._slot import Slots


@dataclass(frozen=True, slots=True)
class EngineReport:
    """How gradients are switched off on this machine, with this torch.

    Args:
        engine: `slot` (one word of libtorch_cpu decides for every thread) or `portable` (thread by thread).
        why: why it is not `slot`, or None.
        libraries: file names of the libraries whose slot is turned.
        function_apply: how `autograd.Function.apply` is kept from recording: `native` or `class attribute`.
        function_apply_why: why it is not `native`, or None.
        not_covered: what still records or runs while gradients are off.
    """

    engine: str
    why: str | None
    libraries: tuple[str, ...]
    function_apply: str
    function_apply_why: str | None
    not_covered: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are written to JSON."""
        return asdict(self)


def engine_report() -> EngineReport:
    """Look for the engine that would be used here; nothing is switched, nothing stays in place.

    Returns:
        What was found. The engine's own self-test runs when gradients are switched off.
    """
    engine = _switch.engine() or _engines.choose()
    apply = _function_apply.choose()
    libraries: tuple[str, ...] = ()
    if isinstance(engine, Slots):
        libraries = tuple(os.path.basename(name) for name in engine.libraries())
    return EngineReport(
        engine=engine.name,
        why=engine.why,
        libraries=libraries,
        function_apply=apply.name,
        function_apply_why=apply.why,
        not_covered=(
            *engine.gaps,
            *(() if apply.gap is None else (apply.gap,)),
            "calling a node of a graph by hand: y.grad_fn(g)",
            "a library that C, not Python, loads while gradients are off, until the switch is next turned",
            "processes that were running before",
        ),
    )
