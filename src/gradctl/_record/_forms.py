"""Forms: what stood between two steps of an optimizer, in order, each distinct one written once with its count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradctl._journal import JournalWriter
from gradctl._record._places import Places, text_of
from gradctl._record._rows import short

MOST_FORMS = 48
LONGEST = 400
"""A group of more operations than this is not booked."""

Written = tuple[str, int, str, int, int]
"""Kind, place, flags, which one, and for a backward which gradients of this optimizer it reached."""


class Op:
    """One operation of a step.

    Args:
        kind: `B` backward, `C` clip, `S` step, `L` scheduler, `Z` zeroing, `x` scale, `u` unscale, `t` the scaler's
            step, `d` the scaler's update.
        site: number of its place.
        flags: see `docs/journal.md`.
        about: `id` of the optimizer that it is about; 0 if it is about none.
        which: number of the loader, parameters or scheduler; -1 if there is none.
        own: flags and reach for single optimizers, by `id`.
    """

    __slots__ = ("about", "flags", "kind", "own", "site", "which")

    def __init__(self, kind: str, site: int, flags: str = "", *, about: int = 0, which: int = -1) -> None:
        self.kind, self.site, self.flags, self.about, self.which = kind, site, flags, about, which
        self.own: dict[int, tuple[str, int]] = {}

    def seen_by(self, key: int) -> Written:
        """Return the operation as the optimizer with that `id` sees it."""
        flags, reach = self.own.get(key, ("", -1))
        mine = "o" if self.about == key else ""
        return self.kind, self.site, self.flags + mine + flags, self.which, reach


class Group:
    """What is known of one group besides its operations.

    Args:
        after: what ended the group before it: `start`, `step` or `skip`.
        end: what ended this one: `step` or `skip`.
        loop: see `_loops.how`.
        clip: norm, limit and loss scale at the last clipping; what is not known is None.
    """

    __slots__ = ("after", "clip", "end", "loop")

    def __init__(self, after: str, end: str, loop: str, clip: tuple[float | None, float, float | None] | None) -> None:
        self.after, self.end, self.loop, self.clip = after, end, loop, clip


class _Form:
    __slots__ = ("count", "fields", "written")

    def __init__(self, fields: dict[str, Any]) -> None:
        self.count = 1
        self.written = 0
        self.fields = fields


class Forms:
    """Books groups and writes their forms.

    Args:
        journal: where they are written.
        places: numbers of places.
    """

    def __init__(self, journal: JournalWriter, places: Places) -> None:
        self._journal = journal
        self._places = places
        self._forms: dict[tuple[Any, ...], _Form] = {}
        self._sites_written = 0
        self._cleared: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self.accumulates = False

    def book(self, o: int, step: int, key: int, ops: Sequence[Op], group: Group) -> None:
        """Book one group of optimizer `o` that ended with its step (or skipped step) number `step`."""
        written = tuple(op.seen_by(key) for op in ops)
        name = (o, group.after, group.end, written)
        form = self._forms.get(name)
        if form is not None:
            form.count += 1
            return
        if len(self._forms) >= MOST_FORMS:
            return
        fields: dict[str, Any] = {"o": o, "n": step, "f": len(self._forms), "after": group.after, "end": group.end}
        if group.loop:
            fields["loop"] = group.loop
        if group.clip is not None:
            norm, limit, scale = group.clip
            fields["norm"], fields["limit"] = None if norm is None else short(norm), short(limit)
            fields["scale"] = scale
        fields["ops"] = written
        self._forms[name] = _Form(fields)
        again = [op[1] for op in written if op[0] == "B" and "r" in op[2] and "i" not in op[2]]
        self.accumulates = self.accumulates or len(set(again)) < len(again)

    def cleared(self, sites: Sequence[int], zero: int) -> None:
        """Note that gradients of the backwards at `sites` were zeroed at `zero` before any step."""
        key = tuple(sites[-LONGEST:]), zero
        counts = self._cleared.get(key)
        if counts is not None:
            counts[0] += 1
        elif len(self._cleared) < MOST_FORMS:
            self._cleared[key] = [1, 0]

    def write(self, *, last: bool = False) -> None:
        """Write what is new; at the end also how often each form has come."""
        for form in list(self._forms.values()):
            if form.written == 0 or (last and form.written != form.count):
                self.write_sites()
                form.written = form.count
                self._journal.event("order", **form.fields, count=form.count)
        if last:
            for (sites, zero), counts in list(self._cleared.items()):
                if counts[0] != counts[1]:
                    self.write_sites()
                    counts[1] = counts[0]
                    self._journal.event("cleared", sites=sites, zero=zero, count=counts[0])

    def write_sites(self) -> None:
        """Write the places that have not been written yet."""
        known = self._places.known()
        for number in range(self._sites_written, len(known)):
            file, line = known[number]
            self._journal.event("site", s=number, file=file, line=line, text=text_of(file, line))
        self._sites_written = len(known)

    def forget(self) -> None:
        """In a forked child: what the parent has seen is the parent's."""
        self._forms.clear()
        self._cleared.clear()
        self._sites_written = 0
        self.accumulates = False
