"""The run directory: made once for all ranks of a host, never shared by two runs, readable by its owner only."""

from __future__ import annotations

import datetime
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gradctl._errors import RunDirectoryError
from gradctl._journal import FILE_NAME

if TYPE_CHECKING:
    from gradctl._policy import Policy
    from gradctl._run._launcher import Rank

FOLDER = "gradctl-runs"
NOT_SEEN = "not_seen.jsonl"
"""Where processes that cannot be recorded leave a line; taken into the journal's end and removed."""
_LAUNCH = ".launch"
_LEADS_NOWHERE = "run:"
"""In front of the name that a mark holds, so that the mark is not taken for one more run directory."""
_OURS = re.compile(r"report\.html|summary\.json|not_seen\.jsonl|\.launch|\.mark|\.rank\d+|journal\.rank.*\.jsonl\.tail")


def make(policy: Policy, script: str, rank: Rank) -> Path:
    """Make the run directory, or join the one that another rank of this launch has made.

    Args:
        policy: says where (`out`), what to append to the name (`name`), and whether an old run may go (`force`).
        script: what the run is called.
        rank: which process of a launched job asks.

    Returns:
        The directory, absolute; made with mode 0700.

    Raises:
        RunDirectoryError: it holds something already, or cannot be made.
    """
    if policy.out is not None:
        return _asked_for(Path(os.path.abspath(policy.out)), rank, force=policy.force)
    base = Path.cwd() / FOLDER
    _make_folder(base)
    stem = _stem(script, policy.name) + (f"-node{rank.node}" if rank.node else "")
    return _fresh(base, stem) if rank.launch is None else agreed(base, stem, rank)


def started_ranks(directory: Path) -> dict[int, int]:
    """Return the process id of each rank that shares this directory; empty without a launcher."""
    found: dict[int, int] = {}
    for name in os.listdir(directory):
        text = _read(directory / name) if name.startswith(".rank") else None
        if text is not None and text.isdecimal() and name[5:].isdecimal():
            found[int(name[5:])] = int(text)
    return found


def tidy(directory: Path) -> None:
    """Remove the files by which ranks agreed, and the directory itself if nothing was recorded in it."""
    mark = _read(directory / ".mark")
    if mark is not None:
        (directory.parent / Path(mark).name).unlink(missing_ok=True)
    for rank in started_ranks(directory):
        (directory / f".rank{rank}").unlink(missing_ok=True)
    for name in (_LAUNCH, ".mark"):
        (directory / name).unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError:
        return  # something was recorded
    try:
        if directory.parent.name == FOLDER:
            directory.parent.rmdir()
    except OSError:
        return  # other runs are kept there


def _asked_for(directory: Path, rank: Rank, *, force: bool) -> Path:
    if rank.node:
        directory = directory.with_name(f"{directory.name}-node{rank.node}")
    if rank.restart:
        # A launcher that starts its ranks again must not meet what the first attempt has left.
        directory = directory.with_name(f"{directory.name}-restart{rank.restart}")
    _make_folder(directory)
    if rank.launch is not None and _read(directory / _LAUNCH) == rank.launch:
        return _take_place(directory, rank)
    held = sorted(os.listdir(directory))
    if held and force:
        for name in held:
            if FILE_NAME.fullmatch(name) or _OURS.fullmatch(name):
                (directory / name).unlink(missing_ok=True)
        held = sorted(os.listdir(directory))
        # What is not ours may stay: nothing in it is overwritten.
    elif held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise _exists(directory, f"it holds {held[0]}{more}")
    if rank.launch is not None:
        if not _create(directory / _LAUNCH, rank.launch) and _read(directory / _LAUNCH) != rank.launch:
            raise _exists(directory, "another run has just started in it")
        return _take_place(directory, rank)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _cannot(directory, PermissionError(13, "Permission denied"))
    return directory


def _take_place(directory: Path, rank: Rank) -> Path:
    if not _create(directory / f".rank{rank.rank}", str(os.getpid())):
        raise _exists(directory, f"rank {rank.rank} of this launch has started in it already")
    return directory


def agreed(base: Path, stem: str, rank: Rank) -> Path:
    """Agree with the other ranks of this host: the first names the directory where the others look.

    Args:
        base: where the directory is made.
        stem: how its name begins.
        rank: which process of a launched job asks.

    Returns:
        The directory, which holds `.rank<k>` for each rank that has come, and `.mark`.

    A rank that finds its own place taken has met an earlier launch from the same shell with the same address, and goes
    on to the next number, as its fellows will.
    """
    for number in itertools.count(1):
        mark = f".launch-{rank.launch}-{rank.restart}-{number}"
        named = _read(base / mark)
        if named is None:
            fresh = _fresh(base, stem)
            if not _create(base / mark, _LEADS_NOWHERE + fresh.name):
                fresh.rmdir()
            named = _read(base / mark) or fresh.name
        directory = base / Path(named.removeprefix(_LEADS_NOWHERE)).name
        _make_folder(directory)
        if _create(directory / f".rank{rank.rank}", str(os.getpid())):
            _create(directory / ".mark", mark)
            return directory
    raise AssertionError("a count has no end")


def _stem(script: str, name: str | None) -> str:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    stem = re.sub(r"\.pyw?$", "", script)
    stem = re.sub(r"[^\w.+=-]+", "_", stem).strip(".-") or "script"
    return f"{stem[:100]}-{now}" + (f"-{name}" if name else "")


def _fresh(base: Path, stem: str) -> Path:
    for number in itertools.count(1):
        directory = base / (stem if number == 1 else f"{stem}-{number}")
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise _cannot(directory, error) from error
        return directory
    raise AssertionError("a count has no end")


def _make_folder(directory: Path) -> None:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError as error:
        raise RunDirectoryError(
            f"the run directory {directory} is a file", fix="name a directory: --out DIR, in Python out="
        ) from error
    except OSError as error:
        raise _cannot(directory, error) from error


def _create(path: Path, text: str) -> bool:
    """Leave `text` under that name, atomically; False if something is there already.

    A link that leads nowhere: it holds its text from its first moment, on every file system that processes share.
    """
    try:
        os.symlink(text, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot(path.parent, error) from error
    return True


def _read(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _exists(directory: Path, why: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"the run directory {directory} is in use",
        why=why,
        fix="name another: --out DIR, or replace its run: --force (in Python: out=, force=True)",
    )


def _cannot(directory: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"cannot make the run directory {directory}",
        why=error.strerror or str(error),
        fix="name one that you may write to: --out DIR, in Python out=",
    )
