"""The examples are whole programs that a person would write; they are run as such."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = EXAMPLES / "digits.py"
DEMO = EXAMPLES / "explain_demo"
MISTAKE = "            x = x.detach()  # the statistics are no part of the graph\n"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def accuracy(output: str) -> float:
    return float(re.findall(r"^test accuracy: ([0-9.]+)%$", output, re.MULTILINE)[-1])


def test_digits_knows_nothing_of_gradctl() -> None:
    tree = ast.parse(DIGITS.read_text(encoding="utf-8"))
    imported = [
        name.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    ]
    imported += [(node.module or "").partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert sorted(set(imported)) == ["__future__", "argparse", "sklearn", "torch"]


def test_digits_under_gradctl_prints_what_it_prints_alone_and_reaches_97_percent(tmp_path: Path) -> None:
    plain = run(DIGITS, "--epochs", "4", cwd=tmp_path)
    watched = run("-m", "gradctl", "run", "--out", "run", DIGITS, "--epochs", "4", cwd=tmp_path)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert (watched.returncode, watched.stdout) == (0, plain.stdout)
    assert accuracy(plain.stdout) >= 97.0
    assert "report.html" in watched.stderr
    summary = json.loads(run("-m", "gradctl", "report", "run", "--json", "-", cwd=tmp_path).stdout)
    assert (summary["script"], summary["exit_code"]) == ("digits.py", 0)
    [rank] = summary["ranks"]
    assert rank["steps"] == 4 * (1437 // 64)
    [optimizer] = rank["optimizers"]
    assert (optimizer["class"], optimizer["parameters"], optimizer["reached"]) == ("AdamW", 11, 11)
    assert rank["nonfinite_steps"] == rank["skipped_steps"] == 0
    assert [finding for finding in summary["findings"] if finding["severity"] != "note"] == []


def test_digits_with_gradients_off_is_refused_at_its_backward_and_the_code_is_the_scripts(tmp_path: Path) -> None:
    done = run("-m", "gradctl", "run", "--grad", "off", "-q", DIGITS, cwd=tmp_path)
    assert done.returncode == 1
    assert "BackwardRefused" in done.stderr
    line = next(n for n, text in enumerate(DIGITS.read_text().splitlines(), start=1) if "loss.backward()" in text)
    assert f"digits.py:{line}" in done.stderr


def test_the_demo_of_explain_looks_healthy_and_is_told_its_line(tmp_path: Path) -> None:
    plain = run(DEMO / "train.py", cwd=tmp_path)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert accuracy(plain.stdout) >= 90.0
    told = run("-m", "gradctl", "explain", "--json", "found.json", DEMO / "train.py", cwd=tmp_path)
    assert told.returncode == 1
    assert told.stdout.startswith(plain.stdout)
    [finding] = json.loads((tmp_path / "found.json").read_text())["findings"]
    line = (DEMO / "models.py").read_text().splitlines(keepends=True).index(MISTAKE) + 1
    assert (finding["slug"], finding["primary"]) == ("detach", {"file": "models.py", "line": line})
    assert finding["parameters"] == ["encoder.0.bias", "encoder.0.weight", "encoder.3.bias", "encoder.3.weight"]
    assert f"cause     detach   models.py:{line}" in told.stdout


def test_the_demo_of_explain_is_clean_once_it_is_mended(tmp_path: Path) -> None:
    mended = shutil.copytree(DEMO, tmp_path / "demo")
    text = (mended / "models.py").read_text()
    assert text.count(MISTAKE) == 1
    text = text.replace(MISTAKE, "").replace("x.mean(0)", "x.detach().mean(0)").replace("x.std(0)", "x.detach().std(0)")
    (mended / "models.py").write_text(text)
    told = run("-m", "gradctl", "explain", "--full", "--steps", "20", mended / "train.py", cwd=tmp_path)
    assert (told.returncode, told.stderr) == (0, "")
    assert "nothing is wrong with the gradients" in told.stdout


def test_make_runs_the_demo_of_explain() -> None:
    recipe = ["make", "-n", "-C", str(EXAMPLES.parent), "explain-demo"]
    printed = subprocess.run(recipe, capture_output=True, text=True, check=True).stdout
    assert "gradctl explain examples/explain_demo/train.py" in printed
    assert (DEMO / "train.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_digits_reaches_97_percent_with_every_seed(tmp_path: Path, seed: int) -> None:
    done = run(DIGITS, "--seed", str(seed), cwd=tmp_path)
    assert accuracy(done.stdout) >= 97.0
