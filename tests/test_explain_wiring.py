"""Who holds what: gradients that no optimizer uses, and what is closed behind its back; the rest stays unblamed."""

from __future__ import annotations

from pathlib import Path

import pytest

import explained
from explain_wiring_programs import BROKEN, HEAD, HEALTHY
from gradctl._results import Finding


def findings(tmp_path: Path, body: str) -> list[Finding]:
    return explained.findings(tmp_path, HEAD + body.lstrip("\n"))


def line_of(body: str) -> int:
    return explained.line_of(HEAD + body.lstrip("\n"))


@pytest.mark.parametrize("name", BROKEN)
def test_the_line_that_left_parameters_out_is_found(name: str, tmp_path: Path) -> None:
    slug, body = BROKEN[name]
    first = findings(tmp_path, body)[0]
    assert first.slug == slug
    assert first.primary is not None
    assert (first.primary.file, first.primary.line) == ("program.py", line_of(body))
    assert first.confidence >= 0.5


@pytest.mark.parametrize("name", HEALTHY)
def test_parameters_left_out_on_purpose_are_not_blamed(name: str, tmp_path: Path) -> None:
    assert findings(tmp_path, HEALTHY[name]) == []


def test_what_the_optimizer_steps_in_vain_is_part_of_the_same_finding(tmp_path: Path) -> None:
    _, body = BROKEN["head_replaced_late"]
    found = findings(tmp_path, body)
    assert len(found) == 1
    assert found[0].measured == {"parameters": 4.0, "idle": 2.0}
