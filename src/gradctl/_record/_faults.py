"""Faults of our own: journalled, counted, and after the third of a tier that tier is switched off."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable

from gradctl._journal import JournalWriter

LIMIT = 3


class Faults:
    """Catches what goes wrong inside the recorder; the program never sees it.

    Args:
        journal: where faults are written.
        switch_off: called once with the name of a tier that has failed `LIMIT` times.
    """

    def __init__(self, journal: JournalWriter, switch_off: Callable[[str], None]) -> None:
        self.count = 0
        self.by_tier: dict[str, int] = {}
        self.off: set[str] = set()
        self._journal = journal
        self._switch_off = switch_off
        self._lock = threading.Lock()

    def caught(self, tier: str, error: Exception) -> None:
        """Note `error`; never raises."""
        with self._lock:
            self.count += 1
            number = self.by_tier[tier] = self.by_tier.get(tier, 0) + 1
            turns_off = number >= LIMIT and tier not in self.off
            if turns_off:
                self.off.add(tier)
        try:
            if number <= LIMIT:
                trace = "".join(traceback.format_exception(error, limit=-6))[-1500:]
                self._journal.event("fault", where=tier, trace=trace)
            if turns_off:
                self._switch_off(tier)
                self._journal.event(
                    "tier_off", tier=tier, why=f"{LIMIT} faults, the last: {type(error).__name__}: {error}"
                )
        except Exception:  # the journal itself is broken: the count is kept, there is nowhere to write it
            self.count += 1

    def renew_lock(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
