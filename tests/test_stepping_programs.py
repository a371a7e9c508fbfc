"""Whole programs whose order of a step is wrong in one place, and healthy ones that only look like it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradctl._journal import Run
from gradctl._results import Finding
from gradctl._verdict import STEPPING, judge

TESTS = Path(__file__).parent
WRONG = sorted((TESTS / "programs_stepping" / "wrong").glob("*.py"))
RIGHT = sorted((TESTS / "programs_stepping" / "right").glob("*.py"))
FRAMEWORKS = ("accelerate_loop", "lightning_loop", "trainer_loop")
DOCS = (TESTS.parent / "docs" / "stepping.md").read_text(encoding="utf-8")


def run_all(folder: str, results: Path) -> None:
    subprocess.run(
        [sys.executable, TESTS / "stepping_programs.py", results, TESTS / "programs_stepping" / folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=110,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("wrong")
    run_all("wrong", results)
    return results


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("right")
    run_all("right", results)
    return results


def about_order(directory: Path) -> list[Finding]:
    return [finding for finding in judge(Run.load(directory)).findings if finding.slug in STEPPING]


@pytest.mark.parametrize("script", WRONG, ids=[path.stem for path in WRONG])
def test_a_wrong_order_is_told_at_its_line_with_the_line_as_it_should_be(script: Path, wrong: Path) -> None:
    told = re.match(r'"""([a-z0-9-]+), line (\d+): (.*)"""\n', script.read_text(encoding="utf-8"))
    assert told is not None
    [found] = about_order(wrong / script.stem)
    assert found.slug == told[1]
    assert found.severity == ("note" if found.slug == "backward-in-autocast" else "warning")
    assert found.primary is not None
    assert (Path(found.primary.file).name, found.primary.line) == (script.name, int(told[2]))
    assert told[3] in found.fix
    assert found.why


@pytest.mark.parametrize("script", RIGHT, ids=[path.stem for path in RIGHT])
def test_a_healthy_program_is_watched_and_not_accused(script: Path, right: Path) -> None:
    directory = right / script.stem
    journal = Run.load(directory).ranks[0]
    assert journal.named("order")
    assert journal.end is not None
    assert journal.end.faults == 0
    assert (directory / "rc").read_text() == ("1" if script.stem == "early_stop" else "0")
    assert about_order(directory) == []


def test_every_slug_has_a_wrong_program_and_a_row_of_the_documentation() -> None:
    shown = {re.match(r'"""([a-z0-9-]+),', path.read_text(encoding="utf-8"))[1] for path in WRONG}  # type: ignore[index]
    assert shown == set(STEPPING)
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", DOCS, re.MULTILINE)) == set(STEPPING)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("undivided_loss", {"microbatches": 4}),
        ("undivided_loss_continue", {"microbatches": 3}),
        ("microbatches_dropped", {"dropped": 4, "microbatches": 5}),
        ("microbatches_dropped_epochs", {"dropped": 16, "microbatches": 5}),
        ("scheduler_after_late_skip", {"times": 2}),
        ("clip_per_microbatch", {"clips": 4}),
    ],
)
def test_what_was_measured_is_what_the_program_did(name: str, numbers: dict[str, float], wrong: Path) -> None:
    [found] = about_order(wrong / name)
    assert found.measured == numbers


def test_clipping_before_unscaling_is_told_with_the_true_norm_and_the_factor_of_the_update(wrong: Path) -> None:
    [found] = about_order(wrong / "clip_before_unscale")
    assert found.measured is not None
    norm, limit, scale = (found.measured[name] for name in ("norm", "limit", "scale"))
    assert (limit, scale) == (1.0, 2.0**14)
    assert 0.1 < norm / scale < 10
    right = min(1.0, limit / (norm / scale))  # what clipping in unscaled units would have left
    assert f"cut the update to {limit / norm / right:.3g} of" in found.why


def test_the_stall_of_16_bit_weights_names_parameters_and_the_line_of_the_step(wrong: Path) -> None:
    [found] = about_order(wrong / "bf16_stall")
    assert set(found.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert 'gradctl.precision("bf16-master")' in found.fix
