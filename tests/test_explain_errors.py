"""Programs that end with an error: which line is blamed, and what is left unblamed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from explain_error_programs import BROKEN, HEAD, HEALTHY
from gradctl._explain._tracing import Tracing
from gradctl._results import Finding


def findings(tmp_path: Path, body: str) -> list[Finding]:
    script = tmp_path / "program.py"
    script.write_text(HEAD + body.lstrip("\n"))
    tracing = Tracing(script=str(script))
    tracing.start()
    error: Exception | None = None
    try:
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception as raised:
            error = raised
        found = tracing.findings(error)
    finally:
        tracing.stop()
    assert tracing.faults == []
    return found


def line_of(body: str) -> int:
    lines = (HEAD + body.lstrip("\n")).splitlines()
    return 1 + next(number for number, line in enumerate(lines) if "# cause" in line)


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
