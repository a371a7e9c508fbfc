"""What `explain` says of whole scripts, against their labels: the shared cases, large programs, the pages of causes.

The labels are the oracle: they were written by reading the program (and, for the small ones, a thread in which people
found the cause), not by running the tool.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
CASES = TESTS / "cases_explain"
LABELS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in sorted(CASES.glob("*.json"))}
BROKEN = [name for name, label in LABELS.items() if label["cause"]]
HEALTHY = [name for name, label in LABELS.items() if not label["cause"]]
PROGRAMS: dict[str, dict[str, Any]] = {
    path.parent.name: json.loads(path.read_text()) for path in sorted((TESTS / "programs").glob("*/label.json"))
}
BROKEN_PROGRAMS = [name for name, label in PROGRAMS.items() if label["cause"]]
HEALTHY_PROGRAMS = [name for name, label in PROGRAMS.items() if not label["cause"]]
LIBRARIES = sorted(path.stem for path in (TESTS / "programs_healthy").glob("*.py"))
CAUSES = TESTS.parent / "docs" / "causes"


def run_all(scripts: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Trace scripts, each in its own process; return what was found by script."""
    out = folder / "found.json"
    subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "diagnose_all.py", out, *scripts],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=600,
        cwd=folder,
    )
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def found_in_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_all([CASES / f"{name}.py" for name in LABELS], tmp_path_factory.mktemp("cases"))


def top(result: dict[str, Any]) -> tuple[str, tuple[str, int]]:
    """Return the slug and the place of the first finding."""
    assert "failed" not in result, result["failed"]
    assert result["findings"], "nothing was found"
    first = result["findings"][0]
    return first["slug"], (Path(first["primary"]["file"]).name, first["primary"]["line"])


def accepted(label: dict[str, Any]) -> list[tuple[str, int]]:
    return [(label["file"], label["line"]), *((Path(file).name, line) for file, line in label.get("also_ok", ()))]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_case_is_located(name: str, found_in_cases: dict[str, Any]) -> None:
    slug, place = top(found_in_cases[str(CASES / f"{name}.py")])
    assert place in accepted(LABELS[name])
    assert slug == LABELS[name]["cause"]


def test_at_least_62_of_65_cases_are_exact(found_in_cases: dict[str, Any]) -> None:
    exact = 0
    for name in BROKEN:
        slug, place = top(found_in_cases[str(CASES / f"{name}.py")])
        exact += slug == LABELS[name]["cause"] and place == (LABELS[name]["file"], LABELS[name]["line"])
    assert len(BROKEN) == 65
    assert exact >= 62


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_case(name: str, found_in_cases: dict[str, Any]) -> None:
    result = found_in_cases[str(CASES / f"{name}.py")]
    assert result == {"findings": [], "faults": [], "steps": result["steps"]}
    assert result["steps"] >= 1 or "manual_sgd" in name


def test_the_tracer_never_switched_itself_off(found_in_cases: dict[str, Any]) -> None:
    assert {name: result["faults"] for name, result in found_in_cases.items() if result["faults"]} == {}


@pytest.fixture(scope="module")
def found_on_pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, list[int]]]:
    """What was found in the example of each page of a cause, with the lines that the page calls right."""
    folder = tmp_path_factory.mktemp("pages")
    lines: dict[str, list[int]] = {}
    for page in sorted(CAUSES.glob("*.md")):
        match = re.search(r"<!-- cause: (line .*?) -->\n```python\n(.*?)^```$", page.read_text(), re.S | re.M)
        if match is not None:
            (folder / f"{page.stem}.py").write_text(match.group(2))
            lines[page.stem] = [int(number) for number in re.findall(r"\d+", match.group(1))]
    found = run_all([folder / f"{slug}.py" for slug in lines], folder)
    return {slug: (found[str(folder / f"{slug}.py")], right) for slug, right in lines.items()}


@pytest.mark.parametrize("slug", sorted(page.stem for page in CAUSES.glob("*.md") if page.stem != "index"))
def test_the_example_of_a_page_is_diagnosed_with_its_slug(slug: str, found_on_pages: dict[str, Any]) -> None:
    result, right = found_on_pages[slug]
    named, (_, line) = top(result)
    assert named == slug
    assert line in right


@pytest.fixture(scope="module")
def found_in_programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    scripts = [TESTS / "programs" / name / "train.py" for name in PROGRAMS]
    return run_all(scripts, tmp_path_factory.mktemp("programs"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BROKEN_PROGRAMS)
def test_a_large_broken_program_is_located(name: str, found_in_programs: dict[str, Any]) -> None:
    slug, place = top(found_in_programs[str(TESTS / "programs" / name / "train.py")])
    assert place in accepted(PROGRAMS[name])
    assert slug == PROGRAMS[name]["cause"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", HEALTHY_PROGRAMS)
def test_nothing_is_found_in_a_large_healthy_program(name: str, found_in_programs: dict[str, Any]) -> None:
    result = found_in_programs[str(TESTS / "programs" / name / "train.py")]
    assert result == {"findings": [], "faults": [], "steps": result["steps"]}
    assert result["steps"] >= 6


@pytest.fixture(scope="module")
def found_in_libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    scripts = [TESTS / "programs_healthy" / f"{name}.py" for name in LIBRARIES]
    return run_all(scripts, tmp_path_factory.mktemp("libraries"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_is_found_in_a_healthy_program_of_a_library(name: str, found_in_libraries: dict[str, Any]) -> None:
    result = found_in_libraries[str(TESTS / "programs_healthy" / f"{name}.py")]
    assert result == {"findings": [], "faults": [], "steps": result["steps"]}
