"""unused_param, late."""

from __future__ import annotations

from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context


def unused_param(context: Context) -> Iterable[Candidate]:
    return ()
