"""Where the files of `gradctl explain` lie, and how the ranks of a launched job do the same thing at the same time.

The ranks of one host agree through files: each leaves a mark where the others look. Nothing is sent, so nothing
disturbs what the script itself sends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gradctl._errors import RunDirectoryError, UsageError
from gradctl._results import Explanation, Finding
from gradctl._run import _directory
from gradctl._run._launcher import Rank

_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_PORT = "MASTER_PORT"
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_FAILED_SECONDS = 5.0
"""How long a rank may go on after another has failed: long enough to fail by itself, and to say why."""
_WORDS_SECONDS = 60.0
_DECISIVE = (1, 3, 4, 0)


class Place(ABC):
    """A directory for the files of the runs, and the other ranks.

    Args:
        own: a directory that exists; removed at the end.
        rank: which process of a launched job this is.
    """

    def __init__(self, own: Path, rank: Rank) -> None:
        self.own = own
        self.rank = rank

    def directory(self, name: str) -> Path:
        """Return the run directory of that name, made if need be; ranks share it."""
        found = self.own / name
        found.mkdir(mode=0o700, exist_ok=True)
        return found

    @abstractmethod
    def anyone(self, wanted: bool) -> bool:
        """Say whether this rank or any other wants it; all ranks get the same answer, when all have asked."""

    @abstractmethod
    def given_up(self) -> bool:
        """Say whether this rank's run waits for one that has failed."""

    @abstractmethod
    def ended(self, *, failed: bool) -> None:
        """Say that this rank's run has ended."""

    @abstractmethod
    def merged(self, found: Explanation) -> Explanation | None:
        """Return what all ranks have found, in the rank that speaks; None in the others."""

    @abstractmethod
    def environment(self, found: Mapping[str, str], *, again: bool) -> dict[str, str]:
        """Return the environment of a run; `again` is true for the second."""


class _Alone(Place):
    def anyone(self, wanted: bool) -> bool:
        return wanted

    def given_up(self) -> bool:
        return False

    def ended(self, *, failed: bool) -> None:
        return

    def merged(self, found: Explanation) -> Explanation | None:
        return found

    def environment(self, found: Mapping[str, str], *, again: bool) -> dict[str, str]:
        if again and _AGENT_STORE in found:
            return _with_store_of_its_own(found, _free_port())
        return dict(found)


class _Ranks(Place):
    """One of several ranks on this host.

    Args:
        own: the shared directory.
        rank: which of them this is.
        size: how many there are on this host.
        pause: waits for a moment, and raises if this process is told to end.
    """

    def __init__(self, own: Path, rank: Rank, size: int, pause: Callable[[], None]) -> None:
        super().__init__(own, rank)
        self._size = size
        self._pause = pause
        self._round = 0
        self._failed_since: float | None = None

    def anyone(self, wanted: bool) -> bool:
        return "1" in self._exchange("wants", "1" if wanted else "0", seconds=None)

    def given_up(self) -> bool:
        if self._failed_since is None:
            if "1" in self._said("ended"):
                self._failed_since = time.monotonic()
            return False
        return time.monotonic() - self._failed_since > _FAILED_SECONDS

    def ended(self, *, failed: bool) -> None:
        self._say("ended", "1" if failed else "0")
        self._exchange("over", "1", seconds=None)  # a run must not meet the store and the ports of the one before
        self._round += 1
        self._failed_since = None

    def merged(self, found: Explanation) -> Explanation | None:
        words = self.own / f"found.{self.rank.rank}.json"
        part = words.with_suffix(".part")
        part.write_text(json.dumps(_packed(found)), encoding="utf-8")
        os.replace(part, words)
        self._say("found", "1")
        if not self.rank.draws:
            return None
        self._exchange("found", "1", seconds=_WORDS_SECONDS)
        ranks = sorted(_directory.started_ranks(self.own), key=self._failed_at)
        files = [self.own / f"found.{rank}.json" for rank in ranks]
        return merge([_unpacked(json.loads(file.read_bytes())) for file in files if file.exists()])

    def _failed_at(self, rank: int) -> tuple[float, int]:
        """When the last run of a rank failed: what the others say after that is often only that it has gone."""
        mark = self.own / f".ended.{self._round - 1}.{rank}"
        try:
            failed = os.readlink(mark) == "1"
            return (mark.lstat().st_mtime_ns if failed else math.inf), rank
        except OSError:
            return math.inf, rank

    def environment(self, found: Mapping[str, str], *, again: bool) -> dict[str, str]:
        if again and _PORT in found:
            return _with_store_of_its_own(found, self._exchange("port", _free_port(), seconds=None)[0])
        return dict(found)

    def _exchange(self, what: str, word: str, *, seconds: float | None) -> list[str]:
        """Say a word, wait until all ranks that are still there have said theirs, and return them."""
        self._say(what, word)
        deadline = None if seconds is None else time.monotonic() + seconds
        while deadline is None or time.monotonic() < deadline:
            said = self._said(what)
            if len(said) >= self._size or len(said) >= self._alive(what):
                return said
            self._pause()
        return self._said(what)

    def _alive(self, what: str) -> int:
        """Count the ranks that have said it or still can."""
        started = _directory.started_ranks(self.own)
        if len(started) < self._size:
            return self._size  # they are still coming
        return sum(1 for rank, pid in started.items() if self._mark(what, rank) is not None or _runs(pid))

    def _say(self, what: str, word: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.symlink(word, self.own / f".{what}.{self._round}.{self.rank.rank}")

    def _said(self, what: str) -> list[str]:
        marks = [self._mark(what, rank) for rank in sorted(_directory.started_ranks(self.own))]
        return [mark for mark in marks if mark is not None]

    def _mark(self, what: str, rank: int) -> str | None:
        try:
            return os.readlink(self.own / f".{what}.{self._round}.{rank}")
        except OSError:
            return None


@contextlib.contextmanager
def place(rank: Rank, *, full: bool, pause: Callable[[], None]) -> Generator[Place]:
    """Make the place for this process, and remove it afterwards.

    Args:
        rank: which process of a launched job this is.
        full: there is one run only, so that ranks on several hosts need not agree on a second.
        pause: waits for a moment, and raises if this process is told to end.

    Raises:
        UsageError: ranks on several hosts cannot agree.
        RunDirectoryError: the directory of temporary files belongs to somebody else.
    """
    if rank.launch is None:
        own = Path(tempfile.mkdtemp(prefix="gradctl-explain-"))
        try:
            yield _Alone(own, rank)
        finally:
            shutil.rmtree(own, ignore_errors=True)
        return
    size = next((int(os.environ[name]) for name in _LOCAL_SIZES if os.environ.get(name, "").isdecimal()), None)
    size = rank.world_size if size is None else size
    if size < rank.world_size and not full:
        raise UsageError(
            "the ranks of several hosts cannot be run a second time together",
            why="they agree through files of one host",
            fix="trace the one run that there is: gradctl explain --full",
        )
    base = _own_folder()
    own = _directory.agreed(base, "explain", rank)
    try:
        yield _Ranks(own, rank, size, pause)
    finally:
        if rank.draws:
            mark = own / ".mark"
            if mark.is_symlink():
                (base / Path(os.readlink(mark)).name).unlink(missing_ok=True)
            shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):
            base.rmdir()  # unless another launch is in it


def _own_folder() -> Path:
    base = Path(tempfile.gettempdir()) / f"gradctl-explain-of-{os.getuid()}"
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        found = base.lstat()
    except OSError as error:
        raise RunDirectoryError(f"cannot make {base}", why=error.strerror or str(error)) from error
    if found.st_uid != os.getuid() or base.is_symlink():
        raise RunDirectoryError(f"{base} belongs to somebody else", fix="name another place: TMPDIR=DIR")
    return base


def _with_store_of_its_own(found: Mapping[str, str], port: str) -> dict[str, str]:
    """Have rank 0 open a store of its own: that of the launcher still holds the addresses of the first run."""
    return {**found, _PORT: port, _AGENT_STORE: "False"}


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("", 0))
        return str(found.getsockname()[1])


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _packed(found: Explanation) -> dict[str, Any]:
    return asdict(found) | {"findings": [finding.to_json() for finding in found.findings]}


def _unpacked(data: dict[str, Any]) -> Explanation:
    fields: dict[str, Any] = {key: tuple(data[key]) for key in ("symptoms", "remarks", "names")}
    fields["findings"] = tuple(Finding.from_json(one) for one in data["findings"])
    return Explanation(**{**data, **fields})


def merge(found: list[Explanation]) -> Explanation:
    """Return one explanation for several ranks: findings of one cause at one place are one finding.

    Args:
        found: that of each rank, the one that counts first; at least one.
    """
    decisive = min(found, key=lambda one: _DECISIVE.index(one.exit_code))
    findings: dict[tuple[str, str], Finding] = {}
    for one in found:
        for finding in one.findings:
            key = finding.slug, str(finding.primary)
            known = findings.get(key)
            findings[key] = finding if known is None else _joined(known, finding)
    order = {"error": 0, "warning": 1, "note": 2}
    return replace(
        decisive,
        findings=tuple(sorted(findings.values(), key=lambda finding: order[finding.severity])),
        symptoms=tuple(dict.fromkeys(symptom for one in found for symptom in one.symptoms)),
        remarks=tuple(dict.fromkeys(remark for one in found for remark in one.remarks)),
        names=tuple(dict.fromkeys(name for one in found for name in one.names)),
    )


def _joined(known: Finding, other: Finding) -> Finding:
    return replace(
        known,
        confidence=max(known.confidence, other.confidence),
        evidence=tuple(dict.fromkeys((*known.evidence, *other.evidence))),
        parameters=tuple(dict.fromkeys((*known.parameters, *other.parameters))),
    )
