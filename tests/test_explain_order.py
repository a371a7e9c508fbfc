"""Order: gradients cleared, replaced, shared or kept at the wrong time; what is meant stays unblamed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from explain_order_programs import BROKEN, HEAD, HEALTHY
from gradctl._explain._tracing import Tracing
from gradctl._results import Finding


def findings(tmp_path: Path, body: str) -> list[Finding]:
    script = tmp_path / "program.py"
    script.write_text(HEAD + body.lstrip("\n"))
    tracing = Tracing(script=str(script))
    tracing.start()
    try:
        runpy.run_path(str(script), run_name="__main__")
        found = tracing.findings()
    finally:
        tracing.stop()
    assert tracing.faults == []
    return found


def line_of(body: str) -> int:
    lines = (HEAD + body.lstrip("\n")).splitlines()
    return 1 + next(number for number, line in enumerate(lines) if "# cause" in line)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", BROKEN)
def test_the_line_that_took_the_gradients_is_found(name: str, tmp_path: Path) -> None:
    slug, body = BROKEN[name]
    first = findings(tmp_path, body)[0]
    assert first.slug == slug
    assert first.primary is not None
    assert (first.primary.file, first.primary.line) == ("program.py", line_of(body))
    assert first.confidence >= 0.5


@pytest.mark.parametrize("name", HEALTHY)
def test_gradients_handled_on_purpose_are_not_blamed(name: str, tmp_path: Path) -> None:
    assert findings(tmp_path, HEALTHY[name]) == []
