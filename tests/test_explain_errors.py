"""Programs that end with an error: which line is blamed, and what is left unblamed."""

from __future__ import annotations

from pathlib import Path

import pytest

import explained
from explain_error_programs import BROKEN, HEAD, HEALTHY
from gradctl._results import Finding


def findings(tmp_path: Path, body: str) -> list[Finding]:
    return explained.findings(tmp_path, HEAD + body.lstrip("\n"), may_raise=True)


def line_of(body: str) -> int:
    return explained.line_of(HEAD + body.lstrip("\n"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_the_line_at_fault_is_found(name: str, tmp_path: Path) -> None:
    slug, body = BROKEN[name]
    first = findings(tmp_path, body)[0]
    assert first.primary is not None
    assert (first.slug, first.primary.file, first.primary.line) == (slug, "program.py", line_of(body))
    assert first.confidence >= 0.5
    assert first.why
    assert first.fix


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HEALTHY)
def test_what_ends_well_is_not_blamed(name: str, tmp_path: Path) -> None:
    assert findings(tmp_path, HEALTHY[name]) == []
