"""history_kept: graphs of past steps that something still holds."""

from __future__ import annotations

from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context


def history_kept(context: Context) -> Iterable[Candidate]:
    return ()
