"""The end of a run's main process: a child without torch draws the report, on stderr and within bounds."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradctl._journal import FILE_NAME
from gradctl._run import _directory, _exit_status
from gradctl._run._injection import withdraw
from gradctl._run._process import take_not_seen

DRAW_SECONDS = 20.0
RANKS_SECONDS = 5.0
"""How long the rank that draws waits for the end records of ranks that are still running."""
FAILED_RANKS_SECONDS = 1.0
"""The same when this rank failed: the others may be waiting for it, and the launcher for all."""
_END = re.compile(rb'\n *\{"k":"end"')  # spaces before a line fill up a page of the file


def main_process_ends(settings: Mapping[str, Any], status: tuple[Any, ...] | None) -> None:
    """Say what the run has left behind; runs in the main process, after everything else.

    Args:
        settings: what GRADCTL_RUN said when the process began.
        status: what `sys.exit` or `os._exit` was given; see `_exit_status.code`.
    """
    if settings["main_pid"] != os.getpid():
        return
    if "explain" in settings:
        from gradctl._run import _traced

        _traced.main_process_ends(dict(settings), status)
        return
    directory = Path(settings["out"])
    failed = _exit_status.code(status) not in (0, None)
    if not settings["draws"]:
        if failed and not settings["quiet"]:
            # The launcher may now stop the rank that draws, which then cannot say this.
            say(f"gradctl: rank {settings['rank']} failed; if no report follows: gradctl report {directory}")
        return
    speaks = settings["rank"] == 0 and not settings["quiet"]
    _flush_script_output()
    interrupt = _ignore_interrupts()
    try:
        if not directory.is_dir():
            if speaks:
                say(f"gradctl: the run directory {directory} is gone: there is nothing to report")
            return
        wait_for_ranks(directory, settings["rank"], seconds=FAILED_RANKS_SECONDS if failed else RANKS_SECONDS)
        not_seen = take_not_seen(directory)
        if any(FILE_NAME.fullmatch(name) for name in os.listdir(directory)):
            (directory / _directory.NOT_SEEN).unlink(missing_ok=True)
            _directory.tidy(directory)
            if speaks or settings["report"]:
                # Of a run whose memory was measured the terminal has the report already.
                measured = settings.get("memory") is not None
                _draw(directory, speaks=speaks and not measured, page=settings["report"])
                if measured and speaks and settings["report"]:
                    say(f"gradctl: page {directory / 'report.html'}")
            return
        (directory / _directory.NOT_SEEN).unlink(missing_ok=True)
        _directory.tidy(directory)
        if speaks:
            if not_seen:
                say(f"gradctl: nothing was recorded: {not_seen[0][1]}")
            elif not failed:  # one that failed has said why; it may never have come to its imports
                say("gradctl: torch was never imported: nothing to record")
    finally:
        if interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)
        _exit_status.keep_interrupt()


def say(text: str) -> None:
    """Write a line to stderr, past Python's buffers: a reader who has left must not change the exit code."""
    try:
        if sys.__stderr__ is not None:
            os.write(sys.__stderr__.fileno(), f"{text}\n".encode("utf-8", "backslashreplace"))
    except (OSError, ValueError):
        return  # closed: nobody is listening


def _draw(directory: Path, *, speaks: bool, page: bool) -> None:
    environment = dict(os.environ)
    withdraw(environment)
    package = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), package]))
    # The child is born with Ctrl-C ignored, as here; from its first line on it dies of it without a word.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "from gradctl.report import draw_at_exit\n"
        f"draw_at_exit({str(directory)!r}, quiet={not speaks}, html={page})"
    )
    command = [sys.executable, "-P", "-c", code]
    silent = os.open(os.devnull, os.O_RDWR)
    try:
        out = sys.__stderr__.fileno() if speaks and sys.__stderr__ is not None else silent
    except (OSError, ValueError):
        out = silent
    try:
        pid = os.posix_spawn(
            sys.executable,
            command,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, silent, 0),
                (os.POSIX_SPAWN_DUP2, out, 1),
                (os.POSIX_SPAWN_DUP2, out, 2),
            ],
            setsigdef=[signal.SIGTERM],
        )
        fault = _wait(pid, DRAW_SECONDS)
        if fault is not None and speaks:
            say(f"gradctl: the report {fault}; draw it with `gradctl report {directory}`")
    except OSError as error:
        if speaks:
            say(f"gradctl: the report could not be drawn ({error}); draw it with `gradctl report {directory}`")
    finally:
        os.close(silent)


def _wait(pid: int, seconds: float) -> str | None:
    """Wait for a child, but not longer than that, then end it; say what went wrong."""
    deadline = time.monotonic() + seconds
    pause = 0.002
    while time.monotonic() < deadline:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None  # the script ignores SIGCHLD: its children vanish by themselves
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else "was interrupted" if code == -signal.SIGINT else f"failed with code {code}"
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"took longer than {seconds:g} s"


def wait_for_ranks(directory: Path, own: int, *, seconds: float = RANKS_SECONDS) -> None:
    """Wait until the other ranks that share this directory have ended.

    Args:
        directory: the run directory.
        own: the rank that waits.
        seconds: how long at most.
    """
    others = {rank: pid for rank, pid in _directory.started_ranks(directory).items() if rank != own}
    deadline = time.monotonic() + seconds
    while others and time.monotonic() < deadline:
        for rank, pid in list(others.items()):
            if _has_ended(directory / f"journal.rank{rank}.jsonl") or not _is_running(pid):
                del others[rank]
        if others:
            time.sleep(0.05)


def _has_ended(journal: Path) -> bool:
    try:
        with journal.open("rb") as file:
            file.seek(-min(65536, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return _END.search(file.read()) is not None
    except OSError:
        return False


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[:1] not in ([b"Z"], [b"X"])
    except OSError:
        pass  # no /proc, or no such process: ask the system
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush_script_output() -> None:
    """Let what the script has printed come before what we say; a reader who has left is the script's own affair."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            continue


def _ignore_interrupts() -> Any:
    """Let Ctrl-C end the report only, not change how the script ends; None where that cannot be done."""
    try:
        return signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        return None  # os._exit in another thread than the main one
