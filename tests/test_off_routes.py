"""The 107 routes past a switch: each is shown to leak without one, and at most four leak with `gradctl.off`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from off_routes import native
from off_routes.__main__ import load

HERE = Path(__file__).parent
ROUTES = load()
FAST = [name for name, route in ROUTES.items() if not route.slow]
SLOW = [name for name, route in ROUTES.items() if route.slow]

DOCUMENTED = {
    "node_call": "a node of an older graph, called by hand, computes; nothing is accumulated",
    "manual_grad_assign": "`.grad` is a plain attribute: not autograd",
    "optim_step_plain": "an optimizer step is arithmetic on data: not autograd",
    "ppool_before": "another process, already running, cannot be reached without its cooperation",
}


def outcomes(mode: str, names: list[str], **environment: str) -> dict[str, dict[str, Any]]:
    """Run the named routes in a process that forks one child each."""
    done = subprocess.run(
        [sys.executable, "-m", "off_routes", mode, *names],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(found) == names
    broken = {name: line["broken"] for name, line in found.items() if "broken" in line}
    assert not broken
    return found


def leaks(found: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, line in found.items() if set(line["marks"]) - {"flag"}}


def check_off(names: list[str], mode: str = "off", **environment: str) -> None:
    found = outcomes(mode, names, **environment)
    assert leaks(found) <= set(DOCUMENTED), {name: found[name] for name in leaks(found) - set(DOCUMENTED)}
    assert not {name for name, line in found.items() if "zero" in line["marks"]}
    assert not {name for name, line in found.items() if not line["restored"]}


def check_controls(names: list[str], **environment: str) -> None:
    assert leaks(outcomes("none", names, **environment)) == set(names) - {"flag_only"}
    expected = {name for name in names if ROUTES[name].past_no_grad} - {"flag_only"}
    assert leaks(outcomes("no_grad", names, **environment)) == expected


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("routes")
    native.build(folder)
    return str(folder)


def test_there_are_107_routes_and_92_get_past_no_grad() -> None:
    assert len(ROUTES) == 108
    assert sum(route.past_no_grad for route in ROUTES.values()) - 1 == 92
    assert len(DOCUMENTED) <= 4
    assert set(DOCUMENTED) <= set(ROUTES)


@pytest.mark.parametrize("mode", ["again", pytest.param("off", marks=pytest.mark.slow)])
def test_no_route_in_this_process_gets_past_off_but_the_documented_ones(mode: str) -> None:
    check_off(FAST, mode)


@pytest.mark.slow
def test_every_route_leaks_without_a_switch_and_those_named_leak_past_no_grad() -> None:
    check_controls(FAST)


@pytest.mark.slow
def test_no_compiled_native_or_remote_route_gets_past_off(library: str) -> None:
    check_off(SLOW, **{native.FOLDER_VARIABLE: library})


@pytest.mark.slow
def test_every_compiled_native_or_remote_route_can_leak(library: str) -> None:
    check_controls(SLOW, **{native.FOLDER_VARIABLE: library})
