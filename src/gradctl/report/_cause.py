"""The pages of causes, as they are told in the terminal: one page, or the list of all with a sentence each."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gradctl._errors import GradctlError, UsageError
from gradctl.report._lines import Lines

_PACKAGE = Path(__file__).parents[1]
FOLDERS = (_PACKAGE / "_causes", _PACKAGE.parents[1] / "docs" / "causes")
"""Where the pages lie: in an installed package, and in a checkout."""
_HIDDEN = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_FENCE = re.compile(r"^```(\w+) \w+$", re.MULTILINE)
_ENTRY = re.compile(r"^\| \[(\w+)\]\(\w+\.md\) \| (.+?) \|$", re.MULTILINE)


_UNKNOWN = """`unknown` is not a cause: something is missing, and what was seen does not show the line that lost it;
pass `gradctl.explain` a function that computes the loss, or run `gradctl explain SCRIPT`.
"""


def pages() -> dict[str, Path]:
    """Return the page of each cause, by its slug.

    Raises:
        GradctlError: the pages are not there.
    """
    for folder in FOLDERS:
        found = {path.stem: path for path in sorted(folder.glob("*.md")) if path.stem != "index"}
        if found:
            return found
    raise GradctlError(
        "the pages of the causes are not installed", why=f"{FOLDERS[0]} holds none", fix="install gradctl again"
    )


def page(slug: str) -> str:
    """Return the page of a cause, Markdown, without the marks that only its tests read; one sentence for `unknown`.

    Raises:
        UsageError: there is no such cause; names those with a similar name.
    """
    known = pages()
    wanted = slug.strip().lower().replace("-", "_")
    if wanted == "unknown":
        return _UNKNOWN
    if wanted not in known:
        near = (
            difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
            or [name for name in known if wanted and set(wanted.split("_")) & set(name.split("_"))][:3]
        )
        raise UsageError(
            f"there is no cause {slug}",
            fix=f"did you mean {' or '.join(near)}?" if near else "`gradctl cause` lists them all",
        )
    return _shown(known[wanted].read_text(encoding="utf-8"))


def _shown(text: str) -> str:
    return _FENCE.sub(r"```\1", _HIDDEN.sub("", text))


def sentences() -> dict[str, str]:
    """Return the sentence that stands for each page, by its slug, as the index of the pages has it.

    Raises:
        GradctlError: the pages are not there.
    """
    index = next(iter(pages().values())).with_name("index.md")
    found = _ENTRY.findall(index.read_text(encoding="utf-8")) if index.is_file() else []
    return {slug: words.replace("`", "") for slug, words in found}


def draw(slug: str, *, console: Console) -> None:
    """Print the page of a cause: laid out on a terminal, as it was written elsewhere.

    Args:
        slug: the cause.
        console: where to.

    Raises:
        UsageError: there is no such cause.
    """
    text = page(slug)
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(text, code_theme="ansi_dark"))
    else:
        console.print(text.strip(), markup=False, highlight=False, soft_wrap=True)


def draw_list(*, console: Console) -> None:
    """Print the slugs of all causes, with one sentence each.

    Args:
        console: where to.
    """
    lines = Lines(console)
    found = pages()
    words = sentences()
    width = max(len(slug) for slug in found)
    for slug in found:
        first, *others = lines.wrapped(words.get(slug, ""), room=lines.width - width - 2)
        lines.put(Text(slug.ljust(width), style="bold") + Text("  ") + first)
        for line in others:
            lines.put(Text(" " * (width + 2)) + line)
