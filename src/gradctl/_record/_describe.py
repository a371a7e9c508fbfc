"""The `opt` record: which parameters an optimizer holds, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl._journal import JournalWriter
from gradctl._names import NameBook
from gradctl._record._rows import learning_rates
from gradctl._record._state import Costs, OptimizerState

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class Describer:
    """Names parameters and writes `opt` records.

    Args:
        journal: where they go.
        names: finds names.
        costs: where the one-off time is booked.
    """

    def __init__(self, journal: JournalWriter, names: NameBook, costs: Costs) -> None:
        self._journal = journal
        self._names = names
        self._costs = costs
        self.fqns: dict[int, str] = {}

    def name(self, tensors: Sequence[Tensor]) -> list[str | None]:
        """Return a name for each of `tensors`."""
        naming = self._names.names_for(tensors)
        self._book(naming.seconds)
        return list(naming.names)

    def describe(self, state: OptimizerState, params: Sequence[Tensor], optimizer: Any = None) -> None:
        """Write what `state` stands for, and fit it to `params`."""
        begin = self._costs.meter()
        groups: list[Any] = optimizer.param_groups if optimizer is not None else []
        given = [name for group in groups for name in group.get("param_names") or [None] * len(group["params"])]
        naming = self._names.names_for(params, given=given if any(given) else None)
        with torch._C.DisableTorchFunction():
            keys = [id(param) for param in params]
            reached = {key for index, key in enumerate(state.keys) if index not in state.never}
            state.trainable = [bool(param.requires_grad) for param in params]
            state.never = {index for index, key in enumerate(keys) if state.trainable[index] and key not in reached}
            state.low_precision = [param.dtype in _LOW_PRECISION for param in params]
            state.names = list(naming.names)
            state.keys, state.num, state.num_groups = keys, len(params), len(groups)
            state.frozen = len(params) - sum(state.trainable)
            state.places, state.previous, state.stalls = {}, None, {}
            state.fast = False
            state.described = True
            self.fqns.update((key, name) for key, name in zip(keys, naming.names, strict=True) if name)
            indexes = [number for number, group in enumerate(groups) for _ in group["params"]]
            self._journal.write(
                "opt",
                now=True,
                o=state.o,
                cls=state.cls,
                source=state.source,
                names=state.names,
                named=naming.how,
                roots=[list(root) for root in naming.roots],
                shapes=[list(param.shape) for param in params],
                dtypes=[str(param.dtype).removeprefix("torch.") for param in params],
                groups=indexes if len(groups) > 1 else 0,
                lr=learning_rates(optimizer) if optimizer is not None else [],
                numel=sum(param.numel() for param in params),
                frozen=state.frozen,
                thread=state.thread,
            )
        self._book(self._costs.meter() - begin)

    def _book(self, seconds: float) -> None:
        self._costs.one_off += seconds
        self._costs.spent += seconds
