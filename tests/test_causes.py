"""The pages of causes: every program on them shows what its page says, and shows it no longer when it is mended."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CAUSES = TESTS.parent / "docs" / "causes"
CASES = TESTS / "cases_explain"
INDEX = (CAUSES / "index.md").read_text(encoding="utf-8")
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in sorted(CAUSES.glob("*.md")) if page.stem != "index"}
LABELS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(CASES.glob("*.json"))}
RAISED = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): ", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    symptom: str
    example: str
    causes: tuple[int, ...]
    mended: str

    @property
    def raises(self) -> bool:
        return RAISED.match(self.symptom) is not None


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def read(slug: str) -> Page:
    text = TEXTS[slug]
    [symptom] = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    [(cause, example)] = re.findall(
        r"^<!-- cause: (line \d+(?:; also: \d+(?:, \d+)*)?) -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    [(replaced, fix)] = re.findall(
        r"^<!-- replaces: (line \d+|lines \d+-\d+) -->\n```python fix\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    first, *last = numbers(replaced)
    lines = example.splitlines(keepends=True)
    indent = re.match(" *", lines[first - 1])
    assert indent is not None
    lines[first - 1 : last[0] if last else first] = textwrap.indent(fix, indent[0])
    return Page(symptom.strip(), example, tuple(numbers(cause)), "".join(lines))


@dataclass(frozen=True)
class Ran:
    code: int
    steps: int
    out: str
    error: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ran]:
    """What each program did, as it stands on its page and mended."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("example", "mended")}
    for slug in TEXTS:
        page = read(slug)
        for kind, folder in folders.items():
            (folder / f"{slug}.py").write_text(getattr(page, kind), encoding="utf-8")
    subprocess.run(
        [sys.executable, TESTS / "cause_examples.py", *folders.values()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=110,
    )
    found: dict[tuple[str, str], Ran] = {}
    for kind, folder in folders.items():
        for slug in TEXTS:
            code, steps, out, error = ((folder / f"{slug}.{end}").read_text() for end in ("rc", "steps", "out", "err"))
            raised = [match.start() for match in RAISED.finditer(error)]
            found[kind, slug] = Ran(int(code), int(steps), out.strip(), error[raised[-1] :] if raised else error)
    return found


@pytest.mark.parametrize("slug", TEXTS)
def test_a_page_has_its_sections_and_a_bounded_length(slug: str) -> None:
    lines = TEXTS[slug].splitlines()
    prose = re.sub(r"^```.*?^```$", "", TEXTS[slug], flags=re.MULTILINE | re.DOTALL)
    titles = [line for line in prose.splitlines() if line.startswith("#")]
    assert titles == [f"# {slug}", "## Symptom", "## Smallest example", "## Why", "## Fix"]
    assert 25 <= len(lines) <= 60


@pytest.mark.parametrize("slug", TEXTS)
def test_an_example_is_short_and_only_its_page_tells_the_faulty_line(slug: str) -> None:
    page = read(slug)
    lines = page.example.splitlines()
    assert len(lines) <= 30
    assert "#" not in page.example
    assert ast.parse(page.example)
    assert all(lines[line - 1].strip() for line in page.causes)
    assert len(set(page.causes)) == len(page.causes)


@pytest.mark.parametrize("slug", TEXTS)
def test_an_example_shows_what_its_page_promises(slug: str, ran: dict[tuple[str, str], Ran]) -> None:
    page, seen = read(slug), ran["example", slug]
    if not page.raises:
        assert (seen.code, seen.out) == (0, page.symptom), seen.error
        return
    assert seen.code == 1
    kind, _, message = page.symptom.partition(": ")
    assert seen.error.startswith(f"{kind}: ")
    if version("torch").startswith("2.13."):  # a release may word it in another way
        assert seen.error.startswith(f"{kind}: {message}")


@pytest.mark.parametrize("slug", TEXTS)
def test_an_example_with_its_fix_runs_through_and_shows_it_no_longer(
    slug: str, ran: dict[tuple[str, str], Ran]
) -> None:
    page, seen = read(slug), ran["mended", slug]
    assert seen.code == 0, seen.error
    assert seen.out != page.symptom


@pytest.mark.parametrize("slug", [slug for slug in TEXTS if "torch.optim" in TEXTS[slug]])
def test_an_example_that_trains_takes_at_least_three_steps(slug: str, ran: dict[tuple[str, str], Ran]) -> None:
    assert ran["mended", slug].steps >= 3
    if not read(slug).raises:
        assert ran["example", slug].steps >= 3


def test_the_catalogue_numbers_every_fault_and_names_pages_that_exist() -> None:
    table = INDEX[INDEX.index("## The catalogue") :]
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", table, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 83 + 1))
    assert len({title for _, title, _ in rows}) == len(rows)
    for _, title, cell in rows:
        links = [re.fullmatch(r"\[(\w+)\]\(\1\.md\)", link) for link in cell.split(", ")]
        assert all(link is not None and link[1] in TEXTS for link in links), title


def test_every_page_stands_in_one_group_and_in_the_catalogue_or_beside_it() -> None:
    groups, catalogue = INDEX.split("## The catalogue")
    grouped = re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| .+\. \|$", groups, re.MULTILINE)
    assert sorted(grouped) == sorted(TEXTS)
    assert set(re.findall(r"\[(\w+)\]\(\1\.md\)", catalogue)) == set(TEXTS)


@pytest.mark.parametrize("name", LABELS)
def test_a_case_has_a_program_and_its_label_points_into_it(name: str) -> None:
    label = LABELS[name]
    assert (CASES / f"{name}.py").exists()
    if label["cause"] is None:
        assert (label["file"], label["line"]) == (None, None)
        return
    assert label["cause"] in TEXTS
    for file, line in [(label["file"], label["line"]), *label["also_ok"]]:
        assert (CASES / file).read_text(encoding="utf-8").splitlines()[line - 1].strip()


def test_all_cases_are_here() -> None:
    healthy = [name for name, label in LABELS.items() if label["cause"] is None]
    assert (len(LABELS), len(healthy)) == (73, 8)


def test_every_link_of_a_page_leads_to_a_page() -> None:
    for text in (INDEX, *TEXTS.values()):
        for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            assert (CAUSES / link).exists(), link


def test_no_page_and_no_case_holds_a_path_of_a_machine() -> None:
    for path in (*CAUSES.iterdir(), *CASES.iterdir()):
        if path.is_file():
            assert not re.search(r"/(home|root|tmp|work|usr|Users)/", path.read_text(encoding="utf-8")), path.name


def test_every_cause_has_a_fix_of_one_line() -> None:
    from gradctl._explain._fixes import fix_for

    fixes = {slug: fix_for(slug) for slug in TEXTS}
    assert [slug for slug, fix in fixes.items() if "gradctl cause" in fix or "\n" in fix] == []
