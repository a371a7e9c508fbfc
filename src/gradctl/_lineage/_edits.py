"""Values that an operation saved for its backward, and that were changed where the version counter does not look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradctl._lineage._facts import DataEdit
from gradctl._lineage._node import Node
from gradctl._lineage._numbers import saved_by
from gradctl._lineage._tracer import NODE, Tracer

if TYPE_CHECKING:
    from gradctl._lineage._backward import Graph


def watch_edits(tracer: Tracer, graph: Graph) -> list[Any]:
    """Compare what functions saved with what was changed through `.data` since; return the handles of the hooks.

    The hooks run after a function has: what a hook of the program unpacks, as a checkpoint does, may be asked for once.
    """
    facts = tracer.facts
    storages: dict[int, list[DataEdit]] = defaultdict(list)
    tensors: dict[int, list[DataEdit]] = defaultdict(list)
    latest = -1
    for mutation in reversed(facts.mutations):
        if mutation.generation < facts.generation - 1:
            break
        if mutation.through_data and not mutation.in_optimizer:
            storages[mutation.storage].append(DataEdit(mutation.op, mutation.stack, mutation.seq))
            latest = max(latest, mutation.seq)
    for key, stack, seq in facts.data_sets:
        tensors[key].append(DataEdit("data.__set__", stack, seq))
        latest = max(latest, seq)
    if latest < 0:
        return []
    handles: list[Any] = []
    for function in graph.nodes:
        node: Node | None = function.metadata.get(NODE) or graph.site.get(function)
        # What was made after the last edit saw its result: in a healthy program that is everything.
        if node is not None and node.seq < latest and getattr(function, "variable", None) is None:
            handles.append(function.register_hook(_hook(tracer, function, node, storages, tensors)))
    return handles


def _hook(
    tracer: Tracer,
    function: Any,
    node: Node,
    storages: dict[int, list[DataEdit]],
    tensors: dict[int, list[DataEdit]],
) -> Callable[..., None]:
    def compare(outgoing: Any, incoming: Any) -> None:
        if tracer.disabled:
            return
        try:
            with torch._C.DisableTorchFunction():
                for _, saved in saved_by(function):
                    if not isinstance(saved, Tensor) or saved.layout is not torch.strided:
                        continue
                    edits = [*storages.get(saved.untyped_storage()._cdata, ()), *tensors.get(id(saved), ())]
                    for edit in edits:
                        if edit.seq > node.seq:
                            tracer.facts.data_edits.setdefault(edit.stack[:1], (edit, node, function.name()))
        except Exception as fault:
            tracer.disable(fault)

    return compare
