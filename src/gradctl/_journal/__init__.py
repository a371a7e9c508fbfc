"""The journal of a run: typed records, append-only JSON lines, one file a process. No torch.

`docs/journal.md` documents every field. A line is written with one `write` to a file opened for appending, so that a
process killed at any moment leaves whole lines only; the reader skips what it cannot read and says how much that was.
Nothing that is read is ever executed.
"""

from __future__ import annotations

from gradctl._journal._kept_away import Hearing, heard_by, keeps_away
from gradctl._journal._norms import PACK_ABOVE, decode_norms, encode_norms
from gradctl._journal._reader import LINE_LIMIT, Run, read
from gradctl._journal._records import (
    FILE_NAME,
    SCHEMA,
    Block,
    Clip,
    End,
    Event,
    Journal,
    Maxima,
    OptimizerRecord,
    Row,
    RunRecord,
    Saved,
    SavedPlace,
)
from gradctl._journal._writer import EVENTS_KEPT, JournalWriter, current, emit, set_current

__all__ = [
    "EVENTS_KEPT",
    "FILE_NAME",
    "LINE_LIMIT",
    "PACK_ABOVE",
    "SCHEMA",
    "Block",
    "Clip",
    "End",
    "Event",
    "Hearing",
    "Journal",
    "JournalWriter",
    "Maxima",
    "OptimizerRecord",
    "Row",
    "Run",
    "RunRecord",
    "Saved",
    "SavedPlace",
    "current",
    "decode_norms",
    "emit",
    "encode_norms",
    "heard_by",
    "keeps_away",
    "read",
    "set_current",
]
