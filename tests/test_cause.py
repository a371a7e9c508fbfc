"""`gradctl cause`: the pages of the causes in the terminal, in a checkout and in a wheel."""

from __future__ import annotations

import io
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from gradctl import _cli
from gradctl._errors import GradctlError, UsageError
from gradctl.report import _cause, draw_cause

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "causes"
SLUGS = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "index")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        _cli.main(["cause", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def drawn(slug: str | None, *, terminal: bool = False, width: int = 80) -> str:
    out = io.StringIO()
    draw_cause(slug, console=Console(file=out, force_terminal=terminal, width=width, highlight=False))
    return out.getvalue()


def test_a_page_is_printed_as_it_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "detach")
    assert (code, err) == (0, "")
    assert out.startswith("# detach\n\n## Symptom\n")
    for head in ("## Smallest example", "## Why", "## Fix"):
        assert head in out
    assert "        return torch.relu(self.tower(x)).detach()\n" in out


@pytest.mark.parametrize("slug", SLUGS)
def test_no_page_shows_the_marks_that_its_tests_read(slug: str) -> None:
    text = _cause.page(slug)
    assert "<!--" not in text
    assert "```python fix" not in text
    assert text.startswith(f"# {slug}\n")


def test_a_slug_may_be_written_with_hyphens() -> None:
    assert _cause.page("zero-grad-misplaced") == _cause.page("zero_grad_misplaced")


def test_a_terminal_gets_a_page_that_is_laid_out() -> None:
    text = drawn("detach", terminal=True)
    assert "\x1b[" in text
    assert "```" not in text


def test_a_file_gets_no_colours() -> None:
    assert "\x1b" not in drawn("detach")
    assert "\x1b" not in drawn(None)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("detachh", "detach"), ("DETACHED", "detach"), ("inplace", "inplace_saved")]
)
def test_an_unknown_slug_is_answered_with_those_that_were_meant(
    capsys: pytest.CaptureFixture[str], wrong: str, meant: str
) -> None:
    code, out, err = call(capsys, wrong)
    assert (code, out) == (2, "")
    assert err.startswith(f"UsageError: there is no cause {wrong}\n  fix   did you mean ")
    assert meant in err


def test_a_slug_like_no_other_is_pointed_to_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "qqqqqq")
    assert (code, err) == (
        2,
        "UsageError: there is no cause qqqqqq\n  fix   `gradctl cause` lists them all\n",
    )


def test_unknown_is_said_to_be_no_cause(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "unknown")
    assert (code, err) == (0, "")
    assert out.startswith("`unknown` is not a cause: ")
    assert out.count(". ") == 0
    assert "unknown" not in drawn(None)


@pytest.mark.parametrize("path", ["../errors", "/etc/passwd", "", "index"])
def test_only_pages_of_causes_are_shown(path: str) -> None:
    with pytest.raises(UsageError, match="there is no cause"):
        _cause.page(path)


@pytest.mark.parametrize("width", [60, 100])
def test_the_list_holds_every_cause_with_one_sentence(width: int) -> None:
    lines = drawn(None, width=width).splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == SLUGS
    assert all(len(line) <= width for line in lines)
    entries = drawn(None, width=1000).splitlines()
    assert len(entries) == len(SLUGS)
    assert all(entry.endswith((".", '"')) and len(entry.split()) > 3 for entry in entries)


def test_the_list_says_of_each_cause_what_the_index_says() -> None:
    table = dict(
        line.strip("| \n").split(" | ", 1)
        for line in (PAGES / "index.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| [")
    )
    assert sorted(table) == [f"[{slug}]({slug}.md)" for slug in SLUGS]
    entries = dict(line.split(None, 1) for line in drawn(None, width=1000).splitlines())
    assert {f"[{slug}]({slug}.md)": words for slug, words in entries.items()} == {
        link: words.replace("`", "") for link, words in table.items()
    }


def test_the_wheel_holds_the_pages_where_they_are_looked_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    ((source, target),) = included.items()
    assert (ROOT / source).samefile(PAGES)
    assert ROOT / "src" / target == _cause.FOLDERS[0]


def test_an_installation_without_pages_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cause, "FOLDERS", (tmp_path / "nowhere", tmp_path))
    with pytest.raises(GradctlError, match="the pages of the causes are not installed"):
        _cause.pages()


def test_pages_in_the_package_come_before_those_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.md").write_text("# own\n", encoding="utf-8")
    monkeypatch.setattr(_cause, "FOLDERS", (tmp_path, PAGES))
    assert list(_cause.pages()) == ["own"]
