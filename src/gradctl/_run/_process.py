"""The journal of one process: named when the first record comes, headed by a `run` record, closed also on a full disk.

Most processes of a program never record anything (data loaders, helpers): they leave no file.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from gradctl import __version__
from gradctl._journal import SCHEMA, JournalWriter
from gradctl._off import began_off
from gradctl._run import _directory
from gradctl._run._redact import redact

Start = Literal["run", "record", "child"]


class ProcessJournal(JournalWriter):
    """Appends records to the journal of this process.

    Args:
        directory: the run directory.
        settings: the fields of GRADCTL_RUN that the `run` record repeats.
        start: how recording began in this process.
        on_failure: called once, with the reason, when the file cannot be written any more.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        *,
        start: Start,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(directory / "journal.rank0.jsonl", on_failure=on_failure)
        self.directory = directory
        self.settings = settings
        self.start: Start = start
        self.started = False
        self.not_seen: dict[tuple[str, str], None] = {}
        self.on_event: Callable[[str, Mapping[str, Any]], None] | None = None
        self._began = time.time()
        self._whole_bytes = 0
        try:
            self._cwd = os.getcwd()
        except OSError:
            self._cwd = ""

    def write(self, kind: str, /, *, now: bool = False, **fields: Any) -> None:
        """Append one record; the first one is preceded by the `run` record, the last one gets what else is known."""
        with self._lock:
            if not self.started:
                self.begin()
            if kind == "run":
                return
            if kind == "end":
                fields = self._with_what_is_known(fields)
                if self.failed is not None:
                    if self._whole_bytes:
                        self._end_in_full_file(fields)
                    return
            super().write(kind, now=now, **fields)

    def event(self, name: str, /, **fields: Any) -> None:
        """Append an event at once, and tell `on_event` of it."""
        super().event(name, **fields)
        if self.on_event is not None:
            self.on_event(name, fields)

    def begin(self) -> None:
        """Name the file and write its `run` record, ahead of the first record of anybody else."""
        with self._lock:
            self.started = True
            self.path = self._free_path()
            super().write("run", now=True, **self._head())

    def discard(self) -> None:
        """Write nothing any more, and make no file if there is none."""
        self.failed = "discarded"

    def flush(self) -> None:
        """Take everything that waits to the file, in one write."""
        with self._lock:
            super().flush()
            if self.failed is None:
                self._whole_bytes = self.bytes

    def forget(self, path: str | os.PathLike[str] | None = None) -> None:
        """In a forked child: drop what the parent has not written yet; its own file is named at its first record."""
        super().forget(path if path is not None else self.path)
        self.start = "child"
        self.started = False
        self._began = time.time()
        self.not_seen.clear()
        self._whole_bytes = 0

    def _free_path(self) -> Path:
        rank, pid = process_rank()[0], os.getpid()
        if self.start != "child":
            own = self.directory / f"journal.rank{rank}.jsonl"
            if not own.exists():
                return own
            if _pid_of(own) == pid:
                # The program has executed itself anew: what it recorded before becomes the journal of a child.
                os.rename(own, self._free_child_path(rank, pid))
                return own
        return self._free_child_path(rank, pid)

    def _free_child_path(self, rank: int, pid: int) -> Path:
        # A process id that was used before gets digits more.
        for text in (str(pid), *(f"{pid}{number:03d}" for number in range(1, 1000))):
            path = self.directory / f"journal.rank{rank}.pid{text}.jsonl"
            if len(text) <= 10 and not path.exists():
                return path
        return self.directory / f"journal.rank{rank}.pid{pid}.jsonl"

    def _head(self) -> dict[str, Any]:
        rank, world_size = process_rank()
        main = self.start != "child"
        argv = self.settings.get("argv") if self.start == "run" else redact(sys.argv)
        torch = sys.modules.get("torch")
        return {
            "schema": SCHEMA,
            "argv": argv,
            "script": self.settings.get("script") if main else os.path.basename(sys.argv[0] if sys.argv else ""),
            "cwd": self._cwd,
            "pid": os.getpid(),
            "ppid": os.getppid(),
            "main": main,
            "rank": rank,
            "world_size": world_size,
            "host": platform.node(),
            "started": round(self._began, 3),
            "python": sys.version.split()[0],
            "torch": str(getattr(torch, "__version__", "")),
            "gradctl": __version__,
            "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
            "device": _device(torch),
            "threads": _number_of_threads(torch),
            "start": self.start,
            "grad": "off" if began_off() else self.settings.get("grad", "on"),
            "budget": self.settings.get("budget", 0.01),
        }

    def _with_what_is_known(self, fields: dict[str, Any]) -> dict[str, Any]:
        not_seen = [list(entry) for entry in fields.get("not_seen") or ()]
        not_seen += [list(entry) for entry in self.not_seen]
        if self.start != "child":
            not_seen += take_not_seen(self.directory)
            fields["children"] = child_pids(self.directory, process_rank()[0])
        if self.failed is not None:
            not_seen.append(["the end of the recording", f"the journal could not be written: {self.failed}"])
        return fields | {"not_seen": not_seen}

    def _end_in_full_file(self, fields: dict[str, Any]) -> None:
        """Give up the last whole lines of a journal on a full disk, so that its end has room."""
        line = json.dumps({"k": "end", **fields}, separators=(",", ":"), default=str).encode() + b"\n"
        try:
            with open(self.path, "r+b", buffering=0) as file:
                size = min(file.seek(0, os.SEEK_END), self._whole_bytes)
                window = min(size, len(line) + 16384)
                file.seek(size - window)
                tail = file.read(window)
                cut = tail.rfind(b"\n", 0, max(0, window - len(line)))
                if cut >= 0:
                    file.truncate(size - window + cut + 1)
                    file.seek(0, os.SEEK_END)
                    file.write(line)
        except OSError:
            return  # the directory is gone: the reader says that there was no goodbye


def _pid_of(journal: Path) -> int | None:
    try:
        with journal.open("rb") as file:
            return int(json.loads(file.readline(1 << 20))["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def process_rank() -> tuple[int, int]:
    """Return rank and world size of this process: from its process group if it has one, else from the launcher."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and getattr(distributed, "is_available", bool)() and distributed.is_initialized():
        return int(distributed.get_rank()), int(distributed.get_world_size())
    from gradctl._run import _launcher

    found = _launcher.find(os.environ)
    return found.rank, found.world_size


def child_pids(directory: Path, rank: int) -> list[int]:
    """Return the process ids of the children that have left a journal under that rank."""
    head, tail = f"journal.rank{rank}.pid", ".jsonl"
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    middles = [name[len(head) : -len(tail)] for name in names if name.startswith(head) and name.endswith(tail)]
    return sorted(int(middle) for middle in middles if middle.isdecimal())


def take_not_seen(directory: Path) -> list[list[str]]:
    """Return what processes said that could not be recorded; a sentence said by several is kept once, with a count."""
    counts: dict[tuple[str, str], int] = {}
    try:
        with open(directory / _directory.NOT_SEEN, "rb") as file:
            lines = file.read(1 << 17).splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            what, why = json.loads(line)
            counts[str(what), str(why)] = counts.get((str(what), str(why)), 0) + 1
        except (ValueError, TypeError):
            continue  # a line that was cut
    return [[what, why if count == 1 else f"{why} ({count} times)"] for (what, why), count in counts.items()]


def _device(torch: Any) -> str:
    cuda = getattr(torch, "cuda", None)
    # Asking whether CUDA is available would start it, and a forked child could not use it any more.
    if cuda is not None and cuda.is_initialized():
        return str(cuda.get_device_name())
    return "cpu"


def _number_of_threads(torch: Any) -> int:
    return int(torch.get_num_threads()) if hasattr(torch, "get_num_threads") else 0
