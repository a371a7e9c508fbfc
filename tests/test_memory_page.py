"""The section of the page on a step's memory: a hostile journal costs the section alone, and gives no markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradctl._journal import Run
from gradctl._verdict import judge
from gradctl.report._page import render
from journals import Trainer, event, write

GOOD: dict[str, Any] = {
    "n": 3, "schema": "gradctl.memory/1", "device": "cpu", "peak_bytes": 600, "saved_bytes": 50,
    "peak_phase": "backward", "peak_operation": "aten.mm.default", "peak_line": "train.py:9 <b>", "peak_module": "a",
    "at_peak": [100, 100, 100, 100, 50, 150], "head_saved_bytes": 10, "head_peak_bytes": 20, "remarks": [],
    "alive": [{"category": "saved", "module": "<script>", "line": "train.py:9 f", "nbytes": 50, "count": 1}],
    "saved_by_line": [{"where": "train.py:9 f", "nbytes": 50, "count": 1}],
    "avoidable": [{"kind": "dead", "module": "a", "line": "train.py:9 f", "nbytes": 5, "why": "frozen"}],
    "moments": [
        {"seconds": 0.0, "phase": "forward", "nbytes": [100, 0, 0, 0, 0, 0]},
        {"seconds": 0.1, "phase": "backward", "nbytes": [100, 100, 100, 100, 50, 150]},
    ],
}  # fmt: skip


def page(folder: Path, **changes: Any) -> str:
    events = [event("memory", 1.0, **{**GOOD, **changes})]
    run = Run.load(write(folder / "run", [Trainer(["a.weight"], [[2, 2]], 5)], events=events))
    return render(run, judge(run))


def test_a_measured_step_is_drawn_and_nothing_in_it_becomes_markup(tmp_path: Path) -> None:
    html = page(tmp_path)
    assert "The memory of step 3" in html
    assert "600 B at the peak" in html
    assert "5 B are saved although no gradient needs them." in html
    assert "&lt;script&gt; train.py:9 f" in html
    assert "train.py:9 <b>" not in html


@pytest.mark.parametrize(
    "changes",
    [
        {"peak_bytes": -1},
        {"peak_bytes": "much"},
        {"at_peak": [1]},
        {"moments": []},
        {"moments": [{"seconds": "x", "phase": "f", "nbytes": [0] * 6}]},
        {"moments": [{"seconds": 0.0, "phase": "f", "nbytes": [1e300] * 6}]},
        {"alive": 7},
        {"avoidable": None},
        {"remarks": 3},
    ],
)
def test_a_section_that_cannot_be_read_is_left_out(changes: dict[str, Any], tmp_path: Path) -> None:
    html = page(tmp_path, **changes)
    assert "The memory of step" not in html
    assert "The layers" in html
