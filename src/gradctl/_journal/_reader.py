"""Reading journals back: nothing that is read is trusted, and nothing is executed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradctl._errors import BadJournal, RunDirectoryError
from gradctl._journal._parser import Parser
from gradctl._journal._records import FILE_NAME, SCHEMA, Journal
from gradctl._journal._tail import open_blocks

LINE_LIMIT = 8 << 20
"""A longer line is skipped, without being held in memory."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory: the journals of its processes, ranks first and in order, then children."""

    directory: Path
    journals: tuple[Journal, ...]

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> Run:
        """Read every journal of a run directory.

        Raises:
            RunDirectoryError: there is no such directory, it cannot be read, or no journal is in it.
            BadJournal: none of its journals can be read; of several, those that cannot are kept as empty ones.
        """
        folder = Path(directory)
        try:
            return Run._load(folder)
        except OSError as error:
            raise RunDirectoryError(f"{folder} cannot be read", why=error.strerror or str(error)) from error

    @staticmethod
    def _load(folder: Path) -> Run:
        if not folder.is_dir():
            raise RunDirectoryError(
                f"{folder} is not a run directory",
                why="it is a file" if folder.exists() else "it does not exist",
                fix="name a directory that `gradctl run` has made, such as gradctl-runs/train-...",
            )
        paths = [path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name) and path.is_file()]
        if not paths:
            raise RunDirectoryError(
                f"{folder} holds no journal",
                why="no file is named journal.rank<k>.jsonl; nothing was recorded there",
                fix="name a directory that `gradctl run` has made",
            )
        journals: list[Journal] = []
        refused: list[BadJournal] = []
        for path in sorted(paths):
            try:
                journals.append(read(path))
            except BadJournal as error:
                refused.append(error)
                journals.append(Journal(path, bad_lines=1))
        if len(refused) == len(paths):
            raise refused[0]
        return Run(folder, tuple(sorted(journals, key=lambda j: (j.is_child, j.rank, j.pid))))

    @property
    def ranks(self) -> tuple[Journal, ...]:
        """The journals of the program's own processes, one a rank."""
        return tuple(journal for journal in self.journals if not journal.is_child)

    @property
    def children(self) -> tuple[Journal, ...]:
        """The journals of Python processes that the program started."""
        return tuple(journal for journal in self.journals if journal.is_child)


def read(path: str | os.PathLike[str]) -> Journal:
    """Read a journal; lines that cannot be read are skipped and counted.

    Raises:
        BadJournal: the file cannot be opened, or holds lines but no journal record at all.
    """
    path = Path(path)
    parser = Parser()
    first: bytes | None = None
    try:
        with path.open("rb") as file:
            for line, whole in _lines(file):
                first = line if first is None else first
                parser.take(line, whole)
    except OSError as error:
        raise BadJournal(f"{path} cannot be read", why=error.strerror or str(error)) from error
    if parser.understood == 0 and parser.bad_lines > 0:
        raise BadJournal(
            f"{path} is not a journal",
            why=f"none of its {parser.bad_lines} lines is a record of {SCHEMA}",
            fix="name a directory that `gradctl run` has made",
        )
    if first is not None:
        parser.take_open_blocks(open_blocks(path, first))
    return parser.journal(path)


def _lines(file: Any) -> Iterator[tuple[bytes | None, bool]]:
    """Yield `(line, whole)`; a line beyond `LINE_LIMIT` is passed over piece by piece and yielded as None."""
    while True:
        line = file.readline(LINE_LIMIT)
        if not line:
            return
        if line.endswith(b"\n"):
            yield line, True
        elif len(line) < LINE_LIMIT:
            yield line, False
        else:
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_LIMIT)
            yield None, True
