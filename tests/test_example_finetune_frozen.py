"""The fine-tuning example runs as a person would run it, and its frozen encoder is untouched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_frozen.py"


def test_the_example_trains_what_it_says_and_reads_the_new_digits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "100"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = {
        way: float(share) for way, share in re.findall(r"^(\w+ \w+ ?\w*) +test accuracy ([\d.]+)%", done.stdout, re.M)
    }
    assert {way.strip() for way in found} == {"everything at once", "head only", "layer by layer"}
    assert min(found.values()) >= 75.0  # five classes, 40 images
    assert "encoder untouched: True" in done.stdout
    assert "DigitNet: 645 of 14,773 elements train (4.37 %)" in done.stdout
    assert re.search(r"from step +25 +'encoder\.2' +trains$", done.stdout, re.MULTILINE)
