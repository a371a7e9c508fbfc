"""Whole programs under `gradctl run`: what is healthy is not accused, what is broken is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradctl._journal import Run
from gradctl._verdict import Verdict, judge

PROGRAMS = Path(__file__).parent / "programs_verdict"
HEALTHY = ("actor_critic", "adapters", "conv_amp", "experts", "hinge", "pixels", "recurrent", "wasserstein")


def run(name: str, tmp_path: Path) -> tuple[Verdict, str]:
    out = tmp_path / name
    command = [
        sys.executable,
        "-m",
        "gradctl",
        "run",
        "--no-report",
        "-q",
        "--out",
        str(out),
        str(PROGRAMS / f"{name}.py"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=110,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return judge(Run.load(out)), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_program_of_a_hundred_steps_gets_no_finding_above_a_note(name: str, tmp_path: Path) -> None:
    found, _ = run(name, tmp_path)
    assert int(next(f.value for f in found.figures if f.label == "steps").replace(",", "")) >= 100
    assert [(f.slug, f.symptom) for f in found.findings if f.severity != "note"] == []
    assert found.level == "good"


def test_a_program_that_diverges_is_told_with_the_step_at_which_it_did(tmp_path: Path) -> None:
    found, printed = run("diverges", tmp_path)
    step = int(re.findall(r"first bad step (\d+)", printed)[0])
    assert found.first_bad_step == step
    assert re.fullmatch(
        rf"(Gradients|The loss) became NaN at step {step}; nothing was learned after it\.", found.sentence
    )


def test_a_program_whose_layers_are_cut_off_is_told_which(tmp_path: Path) -> None:
    found, _ = run("cut", tmp_path)
    assert found.sentence == "6 of 8 parameters never got a gradient."
    assert set(found.findings[0].parameters) == {
        f"{layer}.{kind}" for layer in ("first", "second", "unused") for kind in ("weight", "bias")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slugs"),
    [
        ("head_replaced", {"never-reached", "unoptimized"}),
        ("sixteen_bits", {"bf16-stall"}),
        ("dead", {"gradients-zero"}),
        ("deep_sigmoid", {"gradients-vanish"}),
    ],
)
def test_a_broken_program_is_told_what_is_broken(name: str, slugs: set[str], tmp_path: Path) -> None:
    found, _ = run(name, tmp_path)
    assert {f.slug for f in found.findings if f.severity != "note"} == slugs
