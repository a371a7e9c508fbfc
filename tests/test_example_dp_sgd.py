"""The DP-SGD example trains, its two methods agree, and it states no epsilon of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

EXAMPLE = Path(__file__).parents[1] / "examples" / "dp_sgd.py"


def run(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dp_sgd", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_reads_most_digits_in_spite_of_clipping_and_noise() -> None:
    shown = run("--epochs", "4")
    found = re.search(r"^test accuracy: ([0-9.]+)%$", shown, re.MULTILINE)
    assert found is not None
    assert float(found.group(1)) > 80
    assert "no epsilon is stated" in shown


@pytest.mark.parametrize("method", ["norms", "grads"])
def test_no_sample_moves_the_sum_by_more_than_the_clip(program: ModuleType, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    x, y = torch.randn(9, 64), torch.randint(10, (9,))
    rows = [
        torch.autograd.grad(cross_entropy(model(a), b), list(model.parameters()))
        for a, b in zip(x.split(1), y.split(1), strict=True)
    ]
    norms = [float(torch.cat([g.flatten() for g in row]).norm()) for row in rows]
    clip = sorted(norms)[4]  # four samples are clipped, four are not
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for row, norm in zip(rows, norms, strict=True):
        for total, one in zip(expected, row, strict=True):
            total += one * min(1.0, clip / norm)
    found = program.clipped_sum(model, x, y, clip, method)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5
