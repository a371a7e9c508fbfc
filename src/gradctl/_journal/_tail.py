"""The tail of a journal: a file of one page beside it, with the blocks that are still open.

A block covers up to 1/512 of a run, seconds of a long one. Until it is written the tail holds it: one `pwrite` of a
fixed size inside one page, over what was there before, which a kill cannot cut. It is removed when the journal is
closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUFFIX = ".tail"
SIZE = 4000
"""Bytes of a tail, always; less than a page of memory."""
SECONDS = 0.25
"""A tail is written at most this often."""
_HEAD = 9


def seal(first_line: bytes) -> int:
    """Return what ties a tail to the journal that begins with `first_line`."""
    return zlib.crc32(first_line.strip())


class Tail:
    """Writes the tail of one journal; a file system that refuses it is left alone."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._path: Path | None = None
        self._written_at: float | None = None
        self._refused = False

    def write(self, journal: Path, mark: int, blocks: Callable[[], list[dict[str, Any]]], *, now: float) -> None:
        """Write the open blocks if that is due; those that do not fit are left out from the end.

        Args:
            journal: path of the journal.
            mark: its `seal`.
            blocks: returns the fields of the open blocks.
            now: seconds, monotonic.
        """
        if self._refused or (self._written_at is not None and now - self._written_at < SECONDS):
            return
        self._written_at = now
        found = blocks()
        body = _body(mark, found)
        while len(body) > SIZE - _HEAD - 1:
            found = found[: len(found) * (SIZE - _HEAD) // len(body)] if len(found) > 1 else []
            body = _body(mark, found)
        data = b"%08x %s" % (zlib.crc32(body), body)
        try:
            if self._descriptor is None:
                self._path = path_of(journal).absolute()
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
                self._descriptor = os.open(self._path, flags, 0o600)
            os.pwrite(self._descriptor, data.ljust(SIZE - 1) + b"\n", 0)
        except (OSError, AttributeError):  # no room, or a system without `pwrite`: the journal itself goes on
            self._refused = True

    def remove(self) -> None:
        """Take the file away: the journal has everything."""
        path = self._path
        self.forget()
        if path is not None:
            _unlink(path)

    def forget(self) -> None:
        """In a forked child: the file is the parent's."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        self._path = self._written_at = None
        self._refused = False


def path_of(journal: Path) -> Path:
    """Return where the tail of `journal` lies."""
    return journal.with_name(journal.name + SUFFIX)


def clear(journal: Path) -> None:
    """Take away the tail that an earlier journal of that name has left."""
    _unlink(path_of(journal))


def open_blocks(journal: Path, first_line: bytes) -> list[dict[str, Any]]:
    """Return the blocks in the tail of `journal`; none if it is missing, torn, too long or another journal's."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path_of(journal), flags)
    except OSError:
        return []
    try:
        found = os.fstat(descriptor)
        data = os.read(descriptor, SIZE + 1) if stat.S_ISREG(found.st_mode) else b""
    except OSError:
        return []
    finally:
        os.close(descriptor)
    body = data[_HEAD:].rstrip()
    if len(data) != SIZE or data[:_HEAD] != b"%08x " % zlib.crc32(body):
        return []
    try:
        record = json.loads(body)
        return list(record["b"]) if record["of"] == seal(first_line) else []
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # what stays is known by its seal
        path.unlink()


def _body(mark: int, blocks: list[dict[str, Any]]) -> bytes:
    return json.dumps({"of": mark, "b": blocks}, separators=(",", ":"), default=str).encode()
