"""Order: gradients cleared, replaced, shared or kept at the wrong time; what is meant stays unblamed."""

from __future__ import annotations

from pathlib import Path

import pytest

import explained
from explain_order_programs import BROKEN, HEAD, HEALTHY
from gradctl._results import Finding


def findings(tmp_path: Path, body: str) -> list[Finding]:
    return explained.findings(tmp_path, HEAD + body.lstrip("\n"))


def line_of(body: str) -> int:
    return explained.line_of(HEAD + body.lstrip("\n"))


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
