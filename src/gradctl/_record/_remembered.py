"""What backward remembers, once: in the third step, by reading the graph, or by source line where that was asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradctl import _saved, _taps
from gradctl._journal import JournalWriter
from gradctl._names import NameBook
from gradctl._record._state import Costs

_AFTER_STEPS = 2
_MOST_WALKS = 4
_MOST_ARMED = 3
"""Hooks that counted nothing, since `torch.func` needed them gone, are tried again; then the graph is walked."""
_ROWS = 60


class _HooksDisabled:
    """`_taps.saved_hooks_disabled`, as `arm_lines` wants it."""

    def subscribe(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], /) -> Any:
        return _taps.saved_hooks_disabled.subscribe(wrap, order="measure")


class SavedOnce:
    """Looks at what is saved for backward in one step, and writes it.

    Args:
        journal: where the record goes.
        costs: where the one-off time is booked.
        names: knows the modules.
        fqns: FQN of each parameter by `id`.
        lines: by source line, with saved-tensor hooks.
    """

    def __init__(
        self, journal: JournalWriter, costs: Costs, names: NameBook, fqns: dict[int, str], *, lines: bool
    ) -> None:
        self._journal = journal
        self._costs = costs
        self._names = names
        self._fqns = fqns
        self._lines = lines
        self._watch: Any = None
        self._best: Any = None
        self._step = 0
        self._walks = 0
        self._armed = 0
        self.done = False

    def before_backward(self, outputs: Any, steps: int, parameters: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Look at the graph of `outputs` if this is the step for it.

        Args:
            outputs: what backward is called on.
            steps: steps that were finished before.
            parameters: returns the parameters of all optimizers; their storage does not count.

        Returns:
            The leaves that this backward reaches; empty if nothing was looked at.
        """
        if self.done or steps < _AFTER_STEPS:
            return []
        begin = self._costs.meter()
        leaves: list[Tensor] = []
        try:
            if self._step and steps >= self._step and self._watch is None and not self._lines:
                self._write()
                return []
            if self._watch is not None and not self._is_for_nothing():
                self._write()
                return []
            roots = [output for output in outputs if isinstance(output, Tensor)]
            if not roots or self._walks >= _MOST_WALKS:
                return []
            leaves = _saved.leaves(roots)
            if not self._lines:
                found = _saved.walk(roots, _saved.storage_keys(parameters()), names=self._fqns)
                if self._best is None or found.total > self._best.total:
                    self._best = found
            self._walks += 1
            if not self._lines:
                self._step = steps + 1
        finally:
            seconds = self._costs.meter() - begin
            self._costs.one_off += seconds
            self._costs.spent += seconds
        return leaves

    def after_backward(self, steps: int, parameters: Callable[[], list[Tensor]]) -> None:
        """Arm the hooks on source lines where that was asked; the next backward reads them: between is a forward."""
        if self._lines and self._watch is None and not self.done and steps >= _AFTER_STEPS:
            self._step = steps + 1
            self._armed += 1
            self._watch = _saved.arm_lines(
                _saved.storage_keys(parameters()), modules=self._names.modules(), hooks_disabled=_HooksDisabled()
            )
            if self._watch is None:
                self._journal.event(
                    "not_seen", what="saved bytes by line", why="the program uses saved-tensor hooks of its own"
                )
                self._lines = False

    def _is_for_nothing(self) -> bool:
        """Whether the hooks are back before they counted anything: they are let go, to be armed again."""
        if self._watch.disarm().count or not self._watch.gone:
            return False
        self._watch = None
        if self._armed >= _MOST_ARMED:
            self._lines = False
            self._walks = self._step = 0
            self._journal.event(
                "not_seen",
                what="saved bytes by line",
                why=f"in {_MOST_ARMED} steps the hooks had to step aside, as for torch.func, before they saw anything",
            )
        return True

    def _write(self) -> None:
        self.done = True
        found, method = self._best, "walk"
        if self._watch is not None:
            found, method = self._watch.disarm(), "hooks"
            if not found.count:
                found = None  # cut short, or nothing was saved before the end: a figure of zero would be a lie
            if self._watch.gone:
                self._watch = None
        self._best = None
        if found is None:
            return
        rows = [[row.where, row.module, row.bytes, row.count] for row in found.rows[:_ROWS]]
        self._journal.write("saved", n=self._step, total=found.total, count=found.count, method=method, rows=rows)
        for note in found.notes:
            self._journal.event("not_seen", what="some saved bytes", why=note)

    def stop(self) -> None:
        """Write what was found, if it was not yet, and take hooks back."""
        if self._best is not None or self._watch is not None:
            self._write()
        if self._watch is not None:
            self._watch.disarm()
            self._watch = None
        self.done = True

    def renew(self) -> None:
        """In a forked child: look again."""
        self._best = None
        self._step = self._walks = self._armed = 0
        self.done = False
