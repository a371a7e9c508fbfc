"""grad_overwritten in a hook: what `register_hook` returned in a gradient's place is zero."""

from __future__ import annotations

from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context


def grad_overwritten_in_hook(context: Context) -> Iterable[Candidate]:
    return ()
