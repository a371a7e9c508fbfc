"""What is known about a run as a whole: which processes, how each ended, what its main optimizer did."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from gradctl._journal import End, Journal, Run, RunRecord
from gradctl._results import Span
from gradctl._verdict._loss import Trend, trend
from gradctl._verdict._main import main_journal, main_training, rank_journals
from gradctl._verdict._training import Training, field, trainings, whole


@dataclass(frozen=True)
class Failure:
    """An exception that ended a process.

    Args:
        type: name of its class.
        message: its text.
        span: where it was raised, relative to the script's folder; None when not known.
        rank: the rank it ended, when there are several.
        journal: that of the process.
    """

    type: str
    message: str
    span: Span | None
    rank: int | None
    journal: Journal


@dataclass(frozen=True)
class Facts:
    """A run, read. All fields are derived from the journals; see the properties."""

    run: Run

    @cached_property
    def ranks(self) -> tuple[Journal, ...]:
        """One journal a rank."""
        return rank_journals(self.run)

    @property
    def plan(self) -> Mapping[str, Any] | None:
        """What the run says of its plan; None if it had none, or says what makes no sense."""
        told = self.main.named("plan") if self.main is not None else ()
        data = told[-1].data if told else None
        if data is None or not data.get("applied"):
            return data
        figures = [data.get("budget"), data.get("predicted"), data.get("measured", 0) or 0]
        return data if all(isinstance(f, int | float) and 0 <= f < 1 << 62 for f in figures) else None

    @cached_property
    def main(self) -> Journal | None:
        """The journal that the figures are about."""
        return main_journal(self.ranks)

    @cached_property
    def process(self) -> Journal | None:
        """The journal of the process that was started: its exit code is the run's."""
        return self.run.ranks[0] if self.run.ranks else self.main

    @cached_property
    def trainings(self) -> tuple[Training, ...]:
        """The optimizers of the main journal."""
        return trainings(self.main) if self.main else ()

    @cached_property
    def by_rank(self) -> tuple[tuple[Journal, tuple[Training, ...]], ...]:
        """The optimizers of every rank."""
        return tuple((j, self.trainings if j is self.main else trainings(j)) for j in self.ranks)

    @cached_property
    def _chosen(self) -> tuple[Training | None, tuple[Training, ...]]:
        return main_training(self.trainings)

    @property
    def training(self) -> Training | None:
        """The main optimizer."""
        return self._chosen[0]

    @property
    def stages(self) -> tuple[Training, ...]:
        """The main optimizer and those that step with it."""
        return self._chosen[1]

    @property
    def steps(self) -> int:
        """Steps of the main optimizer; 0 if none was seen."""
        return self.training.steps if self.training else 0

    @cached_property
    def watched(self) -> int:
        """How many first steps were recorded, when `--watch-steps` ended the recording; 0 when it did not."""
        end = self.main.end if self.main else None
        if end is None:
            return 0
        told = [n for what, _ in end.not_seen if (n := what.removeprefix("steps after step ")) != what]
        return whole(
            end.tiers.get("watched"), int(told[0]) if told and told[0].isdecimal() and len(told[0]) < 16 else 0
        )

    @property
    def several(self) -> bool:
        """Whether the run has more than one rank."""
        return len(self.ranks) > 1

    @cached_property
    def players(self) -> tuple[Training, ...]:
        """Optimizers of the main journal with backwards of their own; two or more play a game or hold a reference."""
        stages = {t.id for t in self.stages[1:]}
        return tuple(t for t in self.trainings if t.id not in stages)

    @cached_property
    def trend(self) -> Trend | None:
        """What the main optimizer's loss did; on pipelines the loss lives with the last rank."""
        if self.training is None:
            return None
        own = trend(self.training)
        if own is not None or not self.several:
            return own
        for _, found in self.by_rank:
            for other in found:
                if abs(other.steps - self.steps) <= 1 and (there := trend(other)) is not None:
                    return there
        return None

    @cached_property
    def record(self) -> RunRecord | None:
        """The `run` record that names the program."""
        if self.process is not None and self.process.run is not None:
            return self.process.run
        return self.main.run if self.main else None

    @property
    def end(self) -> End | None:
        """How the started process ended; None when it left no word."""
        return self.process.end if self.process else None

    @cached_property
    def failure(self) -> Failure | None:
        """The exception that ended the run: of several ranks, the first to fail by the clock."""
        found: list[tuple[float, Failure]] = []
        for journal in {id(j): j for j in (*self.run.ranks, *self.ranks)}.values():
            exc = journal.end.exc if journal.end else None
            if not exc:
                continue
            rank = journal.rank if self.several else None
            failure = Failure(field(exc, "type"), field(exc, "message"), self.span(exc, journal), rank, journal)
            found.append((ended_at(journal), failure))
        # sys.exit() beside a failure is its consequence
        return min(found, key=lambda pair: (pair[1].type == "SystemExit", pair[0]))[1] if found else None

    def span(self, place: Mapping[str, Any], journal: Journal | None = None) -> Span | None:
        """Return where an exception points, relative to the script's folder where it lies below it."""
        file, line = field(place, "file"), whole(place.get("line"), 0)
        record = journal.run if journal else None
        return Span(relative(file, record or self.record), line) if file and line else None

    @cached_property
    def still_running(self) -> bool:
        """Whether the process of the main journal is alive: asked of this machine, and only where it was started."""
        journal = self.process
        return journal is not None and journal.end is None and journal.run is not None and is_alive(journal.run)


def ended_at(journal: Journal) -> float:
    """The wall-clock second at which a process ended, as far as its journal tells."""
    return (journal.run.started if journal.run else 0.0) + (journal.end.wall if journal.end else 0.0)


def relative(file: str, record: RunRecord | None) -> str:
    """Return `file` relative to the script's folder where it lies below it, else as it is."""
    if record is None or not file.startswith("/"):
        return file
    first = record.argv[0] if record.argv else ""
    folder = (PurePosixPath(record.cwd) / first).parent if first.endswith(".py") else PurePosixPath(record.cwd)
    try:
        inside = os.path.relpath(file, str(folder))
    except ValueError:
        return file
    return file if inside.startswith("..") or not record.cwd else inside


def is_alive(record: RunRecord) -> bool:
    """Whether the process that wrote `record` still runs on this machine; False where that cannot be told."""
    if record.pid <= 1 or record.host != socket.gethostname():
        return False
    try:
        # the clock ticks at which a process began stand after the name, which may hold anything
        ticks = int(Path(f"/proc/{record.pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
        boot = next(
            int(row.split()[1]) for row in Path("/proc/stat").read_text().splitlines() if row.startswith("btime")
        )
    except (OSError, ValueError, IndexError, StopIteration):
        return False
    began = boot + ticks / os.sysconf("SC_CLK_TCK")
    # the recorder began after its process did; a process that began later has only taken over the number
    return began <= record.started + 2
