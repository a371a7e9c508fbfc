"""examples/serve_threads.py: with gradients off once, no worker keeps a graph; without, every worker does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "serve_threads.py"


def serve(server: str, gradients: str, requests: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--server", server, "--gradients", gradients, "--requests", str(requests)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def check_off(server: str, requests: int) -> None:
    left = serve(server, "off", requests)
    assert left["requests"] >= requests
    assert left["workers"] >= 2
    assert left["workers_that_built_graphs"] == 0
    assert left["live_graphs"] == 0
    assert left["resident_growth_mib"] <= 8


def check_on(server: str, requests: int) -> None:
    left = serve(server, "on", requests)
    assert left["workers"] >= 2
    assert left["workers_that_built_graphs"] == left["workers"]
    assert left["live_graphs"] >= requests


@pytest.mark.parametrize("server", ["threads", "fastapi"])
def test_no_worker_builds_a_graph_with_gradients_off(server: str) -> None:
    check_off(server, 200)


@pytest.mark.parametrize("server", ["threads", "fastapi"])
def test_every_worker_builds_graphs_without_it(server: str) -> None:
    check_on(server, 80)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["threads", "fastapi"])
def test_two_thousand_requests_leave_at_most_eight_mebibytes(server: str) -> None:
    check_off(server, 2000)


@pytest.mark.slow
def test_two_thousand_requests_leave_far_more_without_it() -> None:
    left = serve("threads", "on", 2000)
    assert left["live_graphs"] >= 2000
    assert left["resident_growth_mib"] > 16
