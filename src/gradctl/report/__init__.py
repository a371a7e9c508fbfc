"""Faces of a run: terminal, HTML page, JSON. Draws what a journal and its verdict say and judges nothing; no torch."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gradctl._errors import RunDirectoryError, UsageError
from gradctl._journal import Run
from gradctl.report._summary import summary

if TYPE_CHECKING:
    from rich.console import Console

    from gradctl._results import Explanation
    from gradctl._verdict import Verdict

__all__ = ["draw_at_exit", "draw_cause", "draw_explanation", "draw_terminal", "load", "summary", "write_page"]

PAGE = "report.html"


def load(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run directory that is to be shown.

    Args:
        run_dir: the directory.

    Returns:
        The run; at least one of its journals holds a record.

    Raises:
        RunDirectoryError: there is no such directory, or no journal in it, or its journals are empty.
        BadJournal: no journal in it can be read.
    """
    run = Run.load(run_dir)
    if all(
        j.run is None and j.end is None and not (j.optimizers or j.blocks or j.rows or j.events) for j in run.journals
    ):
        empty = len(run.journals) == 1
        raise RunDirectoryError(
            f"{run.directory} holds no run",
            why=f"{'its journal is' if empty else 'its journals are'} empty: the program was stopped before anything "
            "was recorded, or has only just begun",
            fix="run the program again, or look again in a second",
        )
    return run


def draw_terminal(run: Run, *, console: Console, page: Path | None = None, kept: bool = False) -> Verdict:
    """Print what a run's gradients did, the verdict first.

    Args:
        run: a run directory, read.
        console: where to print; plain text where it is no terminal.
        page: the HTML page to name, if there is one.
        kept: the page was there before and was not drawn again.

    Returns:
        The verdict that was printed.
    """
    from gradctl.report import _terminal

    return _terminal.draw(run, console=console, page=page, kept=kept)


def draw_explanation(found: Explanation, *, console: Console) -> None:
    """Print what `gradctl explain` has found: the cause, its lines of source, why, the fix.

    Args:
        found: the explanation.
        console: where to print; plain text where it is no terminal.
    """
    from gradctl.report import _findings

    _findings.draw(found, console=console)


def draw_cause(slug: str | None, *, console: Console) -> None:
    """Print the page of a cause, or the list of all causes.

    Args:
        slug: the cause; None for the list.
        console: where to print; plain text where it is no terminal.

    Raises:
        UsageError: there is no such cause.
    """
    from gradctl.report import _cause

    if slug is None:
        _cause.draw_list(console=console)
    else:
        _cause.draw(slug, console=console)


def write_page(run: Run, path: str | os.PathLike[str], *, force: bool = True) -> Path:
    """Write the HTML page, whole or not at all, readable by its owner only.

    Args:
        run: a run directory, read.
        path: the file.
        force: replace a file that is there.

    Returns:
        The path.

    Raises:
        UsageError: the file exists and `force` is not given, or it cannot be written.
    """
    from gradctl._verdict import judge
    from gradctl.report import _page

    target = Path(path)
    if target.exists() and not force:
        raise UsageError(f"{target} exists and is not overwritten", fix="name another file, or give --force")
    # text that UTF-8 cannot hold may stand in a journal: a lone surrogate in a parameter's name
    data = _page.render(run, judge(run)).encode("utf-8", "replace")
    try:
        _replace(target, data)
    except OSError as error:
        raise UsageError(f"cannot write {target}", why=error.strerror or str(error)) from error
    return target


def _replace(target: Path, data: bytes) -> None:
    if target.exists() and not target.is_file():
        target.write_bytes(data)  # /dev/stdout, a pipe: there is nothing to replace
        return
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)  # created with mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def draw_at_exit(run_dir: str | os.PathLike[str], *, quiet: bool = False, html: bool = True) -> None:
    """Draw a run that has just ended: the page, then the summary on stderr. Never raises.

    The caller bounds the time and has waited for the other ranks.

    Args:
        run_dir: the run directory.
        quiet: print nothing, not even that something failed.
        html: write `report.html`, replacing one that is there.
    """
    from rich.console import Console

    try:
        run = Run.load(run_dir)
        page = write_page(run, Path(run_dir) / PAGE) if html else None
    except Exception as error:
        run, page = None, None
        _complain(run_dir, error, quiet=quiet)
    try:
        run = run or Run.load(run_dir)
        if not quiet:
            draw_terminal(run, console=Console(stderr=True, highlight=False), page=page)
    except Exception as error:
        _complain(run_dir, error, quiet=quiet)


def _complain(run_dir: str | os.PathLike[str], error: Exception, *, quiet: bool) -> None:
    if quiet:
        return
    reason = str(error).partition("\n")[0] or type(error).__name__
    print(f"gradctl: no report of {os.fspath(run_dir)}: {reason}", file=sys.stderr)
