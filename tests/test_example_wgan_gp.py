"""The WGAN-GP example: with the penalty the critic's slope is one and modes are found, without it neither."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "wgan_gp.py"


def run(*options: str) -> tuple[float, int]:
    shown = subprocess.run(
        [sys.executable, str(EXAMPLE), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    slope = re.search(r"^mean slope of the critic: ([0-9.]+)$", shown, re.MULTILINE)
    modes = re.search(r"^modes found: (\d) of 8", shown, re.MULTILINE)
    assert slope is not None
    assert modes is not None
    return float(slope.group(1)), int(modes.group(1))


def test_the_penalty_holds_the_slope_of_the_critic_at_one() -> None:
    slope, _ = run("--steps", "100")
    assert 0.7 < slope < 1.3


@pytest.mark.slow
def test_the_penalty_finds_the_modes_that_are_lost_without_it() -> None:
    assert run()[1] == 8
    slope, modes = run("--steps", "300", "--penalty", "0")
    assert slope > 2
    assert modes < 5
