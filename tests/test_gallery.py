"""The gallery: every call has a page, and the programs on its pages run and show what they say."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

import gradctl

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted(GALLERY.glob("*.md")) if page.stem != "index"}
PROGRAM = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
HOMES = ("_check", "_custom_grad", "_derivatives", "_freeze", "_precision", "_step")


def programs(name: str) -> list[tuple[str, str | None]]:
    """The programs of a page, each with the output that the page shows right below it, if it shows one."""
    return [(code, shown or None) for code, shown in PROGRAM.findall(PAGES[name])]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_programs_of_a_page_run_and_print_what_it_shows(name: str) -> None:
    found = programs(name)
    assert found, f"{name}.md shows no program"
    for code, shown in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{name}.md", "exec"), {"__name__": "__main__"})
        if shown is not None:
            assert printed.getvalue().split() == shown.split()


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_first_program_of_a_page_uses_its_call_and_holds_something_to_an_oracle(name: str) -> None:
    code = programs(name)[0][0]
    assert f"gradctl.{name}" in code
    shows = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code))) or programs(name)[0][1] is not None
    assert shows, "a program that asserts nothing shows its output"


def test_every_call_has_a_page_and_the_index_lists_them_all() -> None:
    calls = {
        name
        for name in gradctl.__all__
        if getattr(getattr(gradctl, name), "__module__", "").startswith(tuple(f"gradctl.{home}" for home in HOMES))
    }
    assert set(PAGES) == calls
    index = (GALLERY / "index.md").read_text(encoding="utf-8")
    assert {name for name in calls if f"]({name}.md)" not in index} == set()
