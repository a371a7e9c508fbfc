"""One run of the script beneath a verb that waits for it: start it, wait, pass signals on."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradctl._run._injection import inject

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_BY_TERMINAL = 0x80
"""`si_code` of a signal that the kernel has sent: to the whole group in front of the terminal, the script included."""
_GRACE_SECONDS = 1.0
_LAST_SECONDS = 10.0
_TICK_SECONDS = 0.2
_PAUSE_SECONDS = 0.02


class Interrupted(BaseException):
    """A signal has ended the verb and the script that it ran.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Waiting:
    """Holds back the signals that end a program and answers them: the script ends first, then this process."""

    def __init__(self) -> None:
        # One that is ignored (a job in the background, nohup) stays ignored, for the script too.
        self._signals = {s for s in _ENDING if signal.getsignal(s) is not signal.SIG_IGN}
        self.mask: set[Any] = set()

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Hold them back inside; what has arrived meanwhile is delivered when it ends."""
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *self._signals})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def wait(self, pid: int, *, own_group: bool, give_up: Callable[[], bool]) -> int:
        """Wait for the script to end.

        Args:
            pid: the process.
            own_group: it leads a process group of its own, which no terminal reaches.
            give_up: asked now and then; true ends the script.

        Returns:
            Its exit code; negative for a signal.

        Raises:
            Interrupted: this process was told to end; the script has ended.
        """
        asked: int | None = None
        pending: tuple[int, float] | None = None
        gave_up: float | None = None
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done == pid:
                if asked is not None:
                    raise Interrupted(asked)
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if pending is not None and now - pending[1] >= _GRACE_SECONDS:
                _send(pid, pending[0], own_group)
                pending = None
            if gave_up is not None and now - gave_up >= _LAST_SECONDS:
                _send(pid, signal.SIGKILL, own_group)
            elif gave_up is None and give_up():
                _send(pid, signal.SIGTERM, own_group)
                gave_up = now
            signum, from_terminal = self._next(_TICK_SECONDS)
            if signum is None or signum == signal.SIGCHLD:
                continue
            if asked is not None:
                _send(pid, signal.SIGKILL, own_group)  # told a second time
            elif own_group or signum != signal.SIGINT:
                _send(pid, signum, own_group)
            elif not from_terminal:
                # Perhaps it was sent to the whole group: a second Ctrl-C would disturb what the script does about it.
                pending = signum, now
            asked = signum

    def pause(self) -> None:
        """Wait for a moment.

        Raises:
            Interrupted: this process was told to end.
        """
        signum, _ = self._next(_PAUSE_SECONDS)
        if signum is not None and signum != signal.SIGCHLD:
            raise Interrupted(signum)

    def _next(self, seconds: float) -> tuple[int | None, bool]:
        wanted = {signal.SIGCHLD, *self._signals}
        if sys.platform == "linux":
            found = signal.sigtimedwait(wanted, seconds)
            return (None, False) if found is None else (found.si_signo, found.si_code == _BY_TERMINAL)
        for signum in wanted & signal.sigpending():
            return signal.sigwait({signum}), True
        select.select([], [], [], seconds)
        return None, False


def _send(pid: int, signum: int, group: bool) -> None:
    try:
        (os.killpg if group else os.kill)(pid, signum)
    except ProcessLookupError:
        return  # it has just ended


@dataclass(frozen=True, slots=True)
class Streams:
    """Descriptors that the script gets for its input and output."""

    stdin: int = 0
    stdout: int = 1
    stderr: int = 2


def spawn(
    command: Sequence[str],
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    streams: Streams,
    *,
    own_group: bool,
    mask: set[Any],
) -> int:
    """Start the interpreter as `gradctl run` would become it.

    Args:
        command: the interpreter's command line.
        settings: what it is told; see `_injection.inject`.
        environment: its environment, to which they are added.
        streams: its input and output.
        own_group: make it the leader of a session of its own.
        mask: the signals that are held back in it.

    Returns:
        Its process id.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # pyright: ignore[reportUnnecessaryComparison]  (closed by whoever started us)
            stream.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        if own_group:
            os.setsid()
        taken = dict(environment)
        inject(taken, settings)
        for wanted, found in enumerate((streams.stdin, streams.stdout, streams.stderr)):
            if wanted != found:
                os.dup2(found, wanted)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execve(sys.executable, [sys.executable, *command], taken)
    except BaseException as fault:
        os.write(2, f"gradctl: cannot start {sys.executable}: {fault}\n".encode("utf-8", "replace"))
    finally:
        os._exit(127)
