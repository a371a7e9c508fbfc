"""From what was watched in one step to its memory report: the course of the bytes, the peak, and what is saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from gradctl._fit._allocator import Change
from gradctl._fit._ledger import Entry
from gradctl._fit._memory_report import CATEGORIES, Alive, Avoidable, Category, MemoryReport, Moment, SavedAt
from gradctl._fit._memory_watch import Fact, Facts, Place

_MOMENTS: Final = 240
_ROWS: Final = 200
_SAVED: Final = CATEGORIES.index("saved")
_TEMPORARY: Final = CATEGORIES.index("temporary")


def report_of(facts: Facts) -> MemoryReport:
    """Read a report off the facts of a step."""
    devices = sorted({change.device for change in facts.changes if change.device} | {"cpu"})
    courses = {device: _Course(facts, device) for device in devices}
    device = max(devices, key=lambda one: (courses[one].peak, one == "cpu"))
    course = courses[device]
    saved = _Saved(facts, course, device)
    name, place = course.operation
    return MemoryReport(
        device=device,
        peak_bytes=course.peak,
        start_bytes=course.start,
        peaks={one: courses[one].peak for one in devices},
        peak_phase=course.phase,
        peak_operation=name,
        peak_line=(place.line if place else None) or "",
        peak_module=(place.module if place else None) or "",
        at_peak=course.at_peak,
        alive=course.alive_rows(),
        workspace_bytes=course.workspace,
        saved_bytes=saved.total,
        saved_by_module=saved.by(lambda fact: fact.module or "(no module)"),
        saved_by_line=saved.by(lambda fact: fact.line),
        saved_values=len(saved.facts),
        copied_bytes=sum(fact.nbytes for fact in saved.facts),
        weights_saved=saved.standing,
        avoidable=saved.avoidable(),
        head_saved_bytes=saved.of_head(),
        head_peak_bytes=course.of_head(),
        moments=tuple(course.moments),
        remarks=_remarks(facts, courses.values()),
    )


def _remarks(facts: Facts, courses: Iterable[_Course]) -> tuple[str, ...]:
    found: list[str] = []
    if not facts.backwards:
        found.append(
            "the step ran no backward: there are no gradients, and what is saved stays until its graph is gone"
        )
    if not facts.seen_saved:
        found.append("saved-tensor hooks of the program, or torch.func, were in the way: what is saved is not all seen")
    unknown = sum(course.unknown for course in courses)
    if unknown:
        found.append(f"{unknown} bytes were freed that nothing had shown before")
    found += [f"a part was not read: {fault}" for fault in dict.fromkeys(facts.faults)]
    return tuple(found)


class _Course:
    """The bytes of one device over the step, by category."""

    def __init__(self, facts: Facts, device: str) -> None:
        self._facts = facts
        self._device = device
        self._fixed = _fixed(facts)
        standing = [entry for entry in facts.ledger.entries if entry.born == 0 and entry.device == device]
        known = sum(entry.nbytes for entry in standing)
        self.start = max(known, facts.starts.get(device, 0))
        self._live: dict[int, Entry] = {entry.number: entry for entry in standing}
        self._saved: dict[int, list[Fact]] = {}
        self._now = [0] * len(CATEGORIES)
        for entry in standing:
            self._now[self._kind(entry)] += entry.nbytes
        # What a device holds besides: nothing of this step, and nothing that can be named.
        self._now[_TEMPORARY] += self.start - known
        self._toggles = _toggles(facts, device)
        self.peak = self.start
        self.phase = "forward"
        self.operation: tuple[str, Place | None] = ("", None)
        self.at_peak: tuple[int, ...] = tuple(self._now)
        self.alive: dict[int, Entry] = dict(self._live)
        self.saved_then: dict[int, Fact] = {}
        self.workspace = 0
        self.saved_most = 0
        self.saved_at = 0
        self.moments: list[Moment] = []
        self.unknown = 0
        self._run(facts.changes)

    def _run(self, changes: Sequence[Change]) -> None:
        own = sum(1 for change in changes if change.device == self._device)
        width = max(1, -(-own // _MOMENTS))
        total, seen, event, phase, operation = self.start, 0, 0, "forward", 0
        best: tuple[int, Moment] | None = None
        self.moments.append(Moment(0.0, phase, tuple(self._now)))
        self._switch(0)
        for change in changes:
            if change.mark is not None:
                word, _, value = change.mark.partition(" ")
                if word == "event":
                    while event < int(value):
                        self._apply(event)
                        event += 1
                elif word == "phase":
                    phase = value
                elif word == "call":
                    operation = int(value)
                continue
            if change.device != self._device:
                continue
            total += change.nbytes
            seen += 1
            if best is None or total > best[0]:
                best = total, Moment(change.seconds, phase, self._with(total))
            if total > self.peak:
                self._at_peak(total, event, phase, operation)
            if seen % width == 0:
                self.moments.append(best[1])
                best = None
        if best is not None:
            self.moments.append(best[1])
        if total < 0:
            self.unknown = -total

    def _with(self, total: int) -> tuple[int, ...]:
        """Return the categories so that they add up to what the allocator says."""
        found = list(self._now)
        found[_TEMPORARY] += total - sum(found)
        if found[_TEMPORARY] < 0:  # freed an instant ago, and not yet taken off
            found[_SAVED] = max(0, found[_SAVED] + found[_TEMPORARY])
            found[_TEMPORARY] = 0
        return tuple(found)

    def _at_peak(self, total: int, event: int, phase: str, operation: int) -> None:
        self.peak, self.phase = total, phase
        operations = self._facts.ledger.called
        self.operation = operations[operation] if operation < len(operations) else ("", None)
        live = dict(self._live)
        room = total - sum(self._now)
        now = list(self._now)
        # What the operation has made is noted when it returns; its block is there already.
        for change, entry in self._facts.events[event:]:
            where: Any = entry.where
            if change <= 0 or where is None or where.operation != operation or entry.device != self._device:
                break
            if entry.nbytes > room:
                break
            room -= entry.nbytes
            live[entry.number] = entry
            now[self._kind(entry)] += entry.nbytes
        now[_TEMPORARY] += room
        self.workspace = max(0, room)
        self.at_peak = tuple(now)
        self.alive = live
        self.saved_then = {number: found[0] for number, found in self._saved.items()}

    def _kind(self, entry: Entry) -> int:
        fixed = self._fixed.get(entry.number)
        if fixed is not None:
            return fixed
        return _SAVED if self._saved.get(entry.number) else _TEMPORARY

    def _apply(self, event: int) -> None:
        change, entry = self._facts.events[event] if event < len(self._facts.events) else (0, None)
        if entry is not None and entry.device == self._device:
            if change > 0:
                self._live[entry.number] = entry
                self._now[self._kind(entry)] += entry.nbytes
            elif self._live.pop(entry.number, None) is not None:
                self._now[self._kind(entry)] -= entry.nbytes
        self._switch(event + 1)

    def _switch(self, event: int) -> None:
        """Move storages that are saved, or no more, as of an event."""
        for fact, saved in self._toggles.get(event, ()):
            entry = fact.entry
            alive = entry.number in self._live
            if alive:
                self._now[self._kind(entry)] -= entry.nbytes
            found = self._saved.setdefault(entry.number, [])
            if saved:
                found.append(fact)
            elif fact in found:
                found.remove(fact)
            if not found:
                del self._saved[entry.number]
            if alive:
                self._now[self._kind(entry)] += entry.nbytes
        if self._now[_SAVED] > self.saved_most:
            self.saved_most, self.saved_at = self._now[_SAVED], event

    def alive_rows(self) -> tuple[Alive, ...]:
        """Return what is alive at the peak by place."""
        rows: dict[tuple[Category, str, str], list[int]] = defaultdict(lambda: [0, 0])
        facts = self._facts
        for number, entry in self.alive.items():
            fixed = self._fixed.get(number)
            where: Any = entry.where
            fact = self.saved_then.get(number)
            module, line = "", ""
            if fixed is not None:
                kind = CATEGORIES[fixed]
                module = facts.weights.get(number) or facts.gradients.get(number) or ""
            elif fact is not None:
                kind, module, line = "saved", fact.module or "", fact.line
            else:
                kind = "temporary"
                if where is not None:
                    module, line = where.module or "", where.line or ""
            row = rows[kind, module, line]
            row[0] += entry.nbytes
            row[1] += 1
        if self.workspace:
            name, place = self.operation
            row = rows["temporary", (place and place.module) or "", f"inside {name}"]
            row[0] += self.workspace
            row[1] += 1
        found = [Alive(*key, nbytes=size, count=count) for key, (size, count) in rows.items() if size]
        found.sort(key=lambda row: (-row.nbytes, row.category, row.module, row.line))
        return tuple(found[:_ROWS])

    def of_head(self) -> int:
        """Return the bytes at the peak of the last layer's output and of what comes after it."""
        head = self._facts.head
        if head is None:
            return 0
        found = 0
        for number, entry in self.alive.items():
            where: Any = entry.where
            if number not in self._fixed and where is not None and where.node in head:
                found += entry.nbytes
        return found


class _Saved:
    """What is saved at the moment at which most is."""

    def __init__(self, facts: Facts, course: _Course, device: str) -> None:
        at = course.saved_at
        self._facts = facts
        self._fixed = _fixed(facts)
        self.facts = [
            fact
            for fact in facts.saved
            if fact.entry.device == device
            and fact.born <= at
            and (fact.released is None or fact.released > at)
            and (fact.entry.died is None or fact.entry.died > at)
        ]
        self.own: dict[int, list[Fact]] = {}
        for fact in self.facts:
            if fact.entry.number not in self._fixed:
                self.own.setdefault(fact.entry.number, []).append(fact)
        self.standing = sum(1 for fact in self.facts if fact.entry.number in self._fixed)
        self.total = sum(found[0].entry.nbytes for found in self.own.values())

    def by(self, key: Any) -> tuple[SavedAt, ...]:
        rows: dict[str, list[int]] = {}
        for found in self.own.values():
            for place, fact in enumerate(found):
                row = rows.setdefault(key(fact), [0, 0])
                row[0] += fact.entry.nbytes if place == 0 else 0
                row[1] += 1
        ordered = sorted(rows.items(), key=lambda item: (-item[1][0], item[0]))
        return tuple(SavedAt(where, size, count) for where, (size, count) in ordered)

    def of_head(self) -> int:
        return sum(found[0].entry.nbytes for found in self.own.values() if any(fact.head for fact in found))

    def avoidable(self) -> tuple[Avoidable, ...]:
        """Return what backward could do without, each storage once."""
        found: list[Avoidable] = []
        gone: set[int] = set()
        for number, facts in self.own.items():
            if all(fact.dead for fact in facts):
                gone.add(number)
                found.append(_avoidable("dead", facts[0], facts[0].dead or ""))
        first: dict[Any, str] = {}
        for number, facts in self.own.items():
            source = self._facts.ledger.copies.get(number)
            name = self._facts.weights.get(source) if source is not None else None
            if number in gone or name is None or source is None:
                continue
            key = source, facts[0].dtype, facts[0].shape
            if key in first:
                gone.add(number)
                found.append(_avoidable("weight copy", facts[0], f"{name} was copied and saved before"))
            first.setdefault(key, name)
        for group in self._facts.equal:
            here = [entry.number for entry in group if entry.number in self.own and entry.number not in gone]
            for number in here[1:]:
                gone.add(number)
                of = self.own[here[0]][0]
                place = of.line.partition(" ")[0]
                found.append(_avoidable("duplicate", self.own[number][0], f"the same numbers are saved from {place}"))
        return _merged(found)


def _avoidable(kind: Any, fact: Fact, why: str) -> Avoidable:
    return Avoidable(kind, fact.module or "", fact.line, fact.entry.nbytes, why)


def _merged(found: list[Avoidable]) -> tuple[Avoidable, ...]:
    rows: dict[tuple[Any, ...], int] = defaultdict(int)
    for one in found:
        rows[one.kind, one.module, one.line, one.why] += one.nbytes
    merged = [Avoidable(kind, module, line, size, why) for (kind, module, line, why), size in rows.items()]
    return tuple(sorted(merged, key=lambda one: (-one.nbytes, one.kind, one.module, one.line)))


def _fixed(facts: Facts) -> dict[int, int]:
    """Return the category of the storages that keep theirs for life."""
    found: dict[int, int] = {}
    for numbers, category in (
        (facts.inputs, "inputs"),
        (facts.states, "optimizer state"),
        (facts.gradients, "gradients"),
        (facts.weights, "weights"),
    ):
        for number in numbers:
            found[number] = CATEGORIES.index(category)
    return found


def _toggles(facts: Facts, device: str) -> dict[int, list[tuple[Fact, bool]]]:
    found: dict[int, list[tuple[Fact, bool]]] = defaultdict(list)
    for fact in facts.saved:
        if fact.entry.device == device:
            found[fact.born].append((fact, True))
            if fact.released is not None:
                found[fact.released].append((fact, False))
    return found
