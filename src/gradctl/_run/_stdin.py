"""The standard input of a script that is run twice: the second run reads what the first one has read."""

from __future__ import annotations

import os
import select
import stat
import tempfile
import threading
from typing import BinaryIO, Literal

Kind = Literal["same", "file", "pipe", "terminal"]
_CHUNK = 1 << 16


class Input:
    """Gives the same standard input to one run after another: a file from where it stood, a pipe from what was kept.

    A terminal cannot be read twice: the second run gets an empty input.

    Args:
        keep: there may be a second run.
    """

    def __init__(self, *, keep: bool) -> None:
        self.kind: Kind = _kind_of_stdin() if keep else "same"
        self._start = os.lseek(0, 0, os.SEEK_CUR) if self.kind == "file" else 0
        self._kept: BinaryIO | None = None
        if self.kind == "pipe":
            self._kept = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._open: list[int] = []
        self._thread: threading.Thread | None = None

    def begin(self, *, again: bool) -> int:
        """Return the descriptor that a run is to get as its input.

        Args:
            again: this is the second run.
        """
        if self.kind == "file":
            os.lseek(0, self._start, os.SEEK_SET)
        elif self.kind == "pipe":
            self._open = [*os.pipe(), *os.pipe()]
            return self._open[0]
        elif self.kind == "terminal" and again:
            self._open = [os.open(os.devnull, os.O_RDONLY)]
            return self._open[0]
        return 0

    def pour(self) -> None:
        """Begin to write into the pipe; after the run was forked, since a fork of several threads may hang."""
        if self._kept is not None and len(self._open) == 4:
            out, sink, stop, _ = self._open
            os.close(out)  # the run holds the only end: it has gone when nobody reads any more
            os.set_blocking(sink, False)
            self._thread = threading.Thread(target=_pump, args=(self._kept, sink, stop), daemon=True)
            self._thread.start()
            self._open = self._open[1:]

    def end(self) -> None:
        """Stop; the run has ended."""
        if self._thread is not None:
            os.write(self._open[2], b".")
            self._thread.join()
            self._thread = None
        for descriptor in self._open:
            os.close(descriptor)
        self._open = []

    def close(self) -> None:
        """Forget what was kept."""
        if self._kept is not None:
            self._kept.close()


def _kind_of_stdin() -> Kind:
    try:
        mode = os.fstat(0).st_mode
        if stat.S_ISREG(mode):
            return "file"
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return "pipe"
        return "terminal" if os.isatty(0) else "same"
    except OSError:
        return "same"  # closed


def _pump(kept: BinaryIO, sink: int, stop: int) -> None:
    """Write what `kept` holds, then what comes from stdin, which is kept too, until stopped or nobody reads."""
    kept.seek(0)
    waits = kept.read(_CHUNK)
    replaying = bool(waits)
    ended = False
    while True:
        if not waits and replaying:
            waits = kept.read(_CHUNK)
            replaying = bool(waits)
        sources = [stop] if waits or ended else [stop, 0]
        readable, writable, _ = select.select(sources, [sink] if waits else [], [])
        if stop in readable:
            return
        if writable:
            try:
                waits = waits[os.write(sink, waits) :]
            except BlockingIOError:
                continue
            except OSError:
                return  # the script has closed its input, or ended
        elif 0 in readable:
            waits = os.read(0, _CHUNK)
            kept.write(waits)
            if not waits:
                ended = True
                # Closes the writing end, so that the script sees the end of its input; the number stays ours to close.
                os.dup2(stop, sink, inheritable=False)
