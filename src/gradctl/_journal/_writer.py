"""Appending records to the journal of this process."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gradctl._journal._tail import Tail, clear, seal

EVENTS_KEPT = 200
"""Of each event name this many are written, then only their number is kept."""
PAGE = 4096
"""The kernel may end a killed process's write at a page of the file, not within one."""


class JournalWriter:
    """Appends records to one file; opened at the first record, flushed by time and size.

    Args:
        path: the file, created with mode 0600; an existing one is never touched.
        flush_seconds: a record waits at most this long for the next write to take it along.
        flush_bytes: most bytes kept back.
        on_failure: called once, with the reason, when the file cannot be written any more.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        flush_seconds: float = 0.5,
        flush_bytes: int = 65536,
        on_failure: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.path = Path(path)
        self.bytes = 0
        self.failed: str | None = None
        self.dropped: dict[str, int] = {}
        self._flush_seconds = flush_seconds
        self._flush_bytes = flush_bytes
        self._on_failure = on_failure
        self._clock = clock
        self._lock = threading.RLock()
        self._lines: list[str] = []
        self._pending = 0
        self._flushed_at = clock()
        self._started_at = clock()
        self._descriptor: int | None = None
        self._counts: dict[str, int] = {}
        self._tail = Tail()
        self._seal: int | None = None

    def write(self, kind: str, /, *, now: bool = False, **fields: Any) -> None:
        """Append one record of `kind`; `now` takes it to the file at once. Never raises for the file's sake."""
        line = json.dumps({"k": kind, **fields}, separators=(",", ":"), default=str, allow_nan=True)
        with self._lock:
            self._lines.append(line)
            self._pending += len(line) + 1
            if now or self._pending > self._flush_bytes or self._clock() - self._flushed_at > self._flush_seconds:
                self.flush()

    def event(self, name: str, /, **fields: Any) -> None:
        """Append an event at once; beyond `EVENTS_KEPT` of one name only their number is kept."""
        with self._lock:
            count = self._counts[name] = self._counts.get(name, 0) + 1
            if count > EVENTS_KEPT:
                self.dropped[name] = count - EVENTS_KEPT
                return
            fields.setdefault("t", round(self._clock() - self._started_at, 4))
            self.write("event", now=True, e=name, **fields)

    def flush(self) -> None:
        """Take everything that waits to the file, so that a kill at any moment cuts no line of up to `PAGE` bytes."""
        with self._lock:
            if not self._lines:
                return
            lines = [(line + "\n").encode("utf-8", "surrogateescape") for line in self._lines]
            self._lines.clear()
            self._pending = 0
            self._flushed_at = self._clock()
            if self.failed is not None:
                return
            try:
                if self._descriptor is None:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
                    self._descriptor = os.open(self.path, flags, 0o600)
                    self._seal = seal(lines[0])
                    clear(self.path)
                for data in _by_page(lines, self.bytes):
                    while data:  # once; a second write only tells why the first was cut short, by a full disk
                        written = os.write(self._descriptor, data)
                        self.bytes += written
                        data = data[written:]
            except OSError as error:
                self._fail(error.strerror or str(error))

    def tail(self, blocks: Callable[[], list[dict[str, Any]]], *, now: float) -> None:
        """Keep the open blocks beside the journal until they are written, so that a kill does not lose them.

        Args:
            blocks: returns the fields of the open blocks; called only if the tail is due, four times a second at most.
            now: seconds, monotonic.
        """
        with self._lock:
            if self._descriptor is not None and self._seal is not None:
                self._tail.write(self.path, self._seal, blocks, now=now)

    def close(self) -> None:
        """Flush and close the file; later records are dropped."""
        with self._lock:
            self.flush()
            self._tail.remove()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            self.failed = self.failed or "closed"

    def forget(self, path: str | os.PathLike[str]) -> None:
        """In a forked child: drop what the parent has not written yet and go on in a file of our own."""
        self._lock = threading.RLock()
        self._lines, self._pending, self._counts, self.dropped = [], 0, {}, {}
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._seal = None
        self._tail.forget()
        self.path, self.bytes, self.failed = Path(path), 0, None

    def _fail(self, reason: str) -> None:
        self.failed = reason
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._on_failure is not None:
            self._on_failure(reason)


def _by_page(lines: list[bytes], offset: int) -> Iterator[bytes]:
    """Group lines into writes that each stay inside one page of the file; spaces between lines fill up a page."""
    chunk, room = b"", PAGE - offset % PAGE
    for line in lines:
        if len(line) > room:
            if len(line) <= PAGE:
                chunk = chunk[:-1] + b" " * room + chunk[-1:]  # at the end of a line, else before the next one
            yield chunk
            chunk, room = b"", PAGE if len(line) <= PAGE else room
        chunk += line
        room -= len(line)
        if room <= 0:
            yield chunk
            chunk, room = b"", PAGE - (-room) % PAGE
    yield chunk


_current: JournalWriter | None = None


def current() -> JournalWriter | None:
    """Return the journal of this process, if it is being recorded."""
    return _current


def set_current(writer: JournalWriter | None) -> None:
    """Say which journal `emit` writes to."""
    global _current
    _current = writer


def emit(name: str, /, **fields: Any) -> None:
    """Write an event to the journal of this process, if it is being recorded."""
    if _current is not None:
        _current.event(name, **fields)
