"""What `gradctl explain` prints: its layout, what it leaves out, and many names in few words."""

from __future__ import annotations

import fnmatch
import io
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradctl._results import Explanation, Finding, Span
from gradctl.report import draw_explanation
from gradctl.report._findings import source
from gradctl.report._fqns import collapse

MODEL = """import torch


def features(f, name):
    if name == "img":
        f = f / f.norm(dim=-1, keepdim=True)
        f = f.detach()
    elif name == "aud":
        f = f.tanh()
    return f
"""
CUT = Finding(
    slug="detach",
    severity="error",
    symptom="2 of 6 parameters never get a gradient",
    why="`.detach()` cuts the gradient here.",
    fix="Take the detach away:\nf = f / f.norm(dim=-1, keepdim=True)",
    primary=Span("model.py", 7),
    evidence=(Span("train.py", 41, "consumed"), Span("train.py", 44, "loss")),
    parameters=("img.weight", "img.bias"),
    path="img.weight → linear → layer_norm → div → ✗ detach → stack → loss",
)
FROZEN = Finding(
    slug="frozen_params",
    severity="warning",
    symptom="text.weight is frozen",
    why="Nobody reads this.",
    fix="text.requires_grad_(True)",
    primary=Span("model.py", 9),
    parameters=("text.weight",),
)
HARMLESS = Finding(
    slug="item", severity="note", symptom="a number for the log", why="w", fix="f", primary=Span("train.py", 50)
)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    return str(tmp_path)


def drawn(found: Explanation, *, width: int = 100, terminal: bool = False, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    draw_explanation(found, console=Console(file=out, width=width, force_terminal=terminal, highlight=False))
    out.seek(0)
    return out.read()


def explanation(folder: str, *findings: Finding, code: int = 1, sentence: str = "1 cause", **more: tuple[str, ...]):
    return Explanation("train.py", code, sentence, findings=findings, folder=folder, **more)


def test_a_cause_is_told_from_the_symptom_to_the_fix(folder: str) -> None:
    assert drawn(explanation(folder, CUT)) == (
        "gradctl explain train.py\n"
        "\n"
        "  symptom   2 of 6 parameters never get a gradient\n"
        "  cause     detach   model.py:7\n"
        "\n"
        '          5 |     if name == "img":\n'
        "          6 |         f = f / f.norm(dim=-1, keepdim=True)\n"
        "     >    7 |         f = f.detach()\n"
        '          8 |     elif name == "aud":\n'
        "\n"
        "  affected  img.{weight,bias}  (2)\n"
        "  path      img.weight → linear → layer_norm → div → ✗ detach → stack → loss\n"
        "  why       `.detach()` cuts the gradient here.\n"
        "  fix       Take the detach away:\n"
        "            f = f / f.norm(dim=-1, keepdim=True)\n"
        "  see also  train.py:41  consumed\n"
        "            train.py:44  loss\n"
        "\n"
        "  more about it: gradctl cause detach\n"
    )


def test_a_second_finding_is_shorter(folder: str) -> None:
    text = drawn(explanation(folder, CUT, FROZEN, sentence="2 causes"))
    assert text.count(" | ") == 4
    assert (
        "\n  and       frozen_params   model.py:9\n"
        "            text.weight is frozen\n"
        "  affected  text.weight\n"
        "  fix       text.requires_grad_(True)\n"
    ) in text
    assert "Nobody reads this." not in text


def test_a_clean_program_is_told_in_one_line(folder: str) -> None:
    text = drawn(explanation(folder, code=0, sentence="nothing is wrong with the gradients of 40 steps"))
    assert text == "gradctl explain train.py\n\n  ● nothing is wrong with the gradients of 40 steps\n"


def test_harmless_breaks_are_listed_below_as_harmless(folder: str) -> None:
    text = drawn(explanation(folder, HARMLESS, code=0, sentence="nothing is wrong with the gradients"))
    head, _, notes = text.partition("this also happens, and does no harm:")
    assert "nothing is wrong" in head
    assert notes == "\n    item   train.py:50   a number for the log\n"


def test_symptoms_without_a_cause_are_listed_and_nothing_is_invented(folder: str) -> None:
    text = drawn(
        explanation(folder, code=4, sentence="no verdict: not found", symptoms=("3 parameters get none", "NaN"))
    )
    assert text.splitlines()[2:] == [
        "  ● no verdict: not found",
        "",
        "  symptom   3 parameters get none",
        "  symptom   NaN",
    ]


def test_crumbs_stand_below_what_was_said_and_seen(folder: str) -> None:
    crumb = replace(CUT, confidence=0.3, severity="warning", symptom="a value left autograd")
    found = explanation(folder, crumb, code=4, sentence="no verdict: once only", symptoms=("2 get none",))
    assert drawn(found).splitlines()[2:] == [
        "  ● no verdict: once only",
        "",
        "  symptom   2 get none",
        "",
        "  perhaps   detach   model.py:7",
        "",
        '          5 |     if name == "img":',
        "          6 |         f = f / f.norm(dim=-1, keepdim=True)",
        "     >    7 |         f = f.detach()",
        '          8 |     elif name == "aud":',
        "",
        "            a value left autograd",
        "  fix       Take the detach away:",
        "            f = f / f.norm(dim=-1, keepdim=True)",
        "",
        "  more about it: gradctl cause detach",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_prose_stays_within_the_width_and_keeps_its_words(folder: str, width: int) -> None:
    long = Finding(**{name: getattr(CUT, name) for name in CUT.__slots__} | {"why": "many words " * 30})
    lines = drawn(explanation(folder, long), width=width).splitlines()
    whole = re.compile(" {12}f = |.* [|] |.*gradctl cause")  # code and commands are to be copied
    assert all(len(line) <= width for line in lines if not whole.match(line))
    assert " ".join(" ".join(lines).split()).count("many words") == 30


def test_there_is_colour_on_a_terminal_only(folder: str) -> None:
    found = explanation(folder, CUT, FROZEN)
    assert "\x1b[" not in drawn(found)
    coloured = drawn(found, terminal=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == drawn(found)


def test_a_terminal_that_knows_ascii_only_gets_ascii(folder: str) -> None:
    text = drawn(explanation(folder, CUT), encoding="ascii")
    assert "img.weight -> linear -> layer_norm -> div -> x detach -> stack -> loss" in text


def test_what_a_program_names_cannot_command_the_terminal(folder: str) -> None:
    evil = Finding(
        slug="detach", severity="error", symptom="\x1b]0;owned\x07", why="\u202eevil", fix="a\n\x1b[2Jb",
        parameters=("p\x1b[31m",), path="\x9b0m", primary=Span("\x1bfile.py", 1),
    )  # fmt: skip
    text = drawn(explanation(folder, evil, symptoms=("\x1b[1m",), code=1))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


@pytest.mark.parametrize(
    ("line", "shown"), [(1, [1, 2]), (2, [1, 2, 3]), (7, [5, 6, 7, 8]), (10, [8, 9, 10]), (11, []), (0, [])]
)
def test_four_lines_are_shown_and_fewer_at_the_ends_of_a_file(folder: str, line: int, shown: list[int]) -> None:
    found = source(Span("model.py", line), folder)
    assert [number for number, _ in found] == shown
    assert [text for _, text in found] == [MODEL.splitlines()[number - 1] for number in shown]


def test_a_file_that_is_not_there_costs_its_lines_only(folder: str) -> None:
    gone = Finding(slug="detach", severity="error", symptom="s", why="w", fix="f", primary=Span("gone.py", 3))
    text = drawn(explanation(folder, gone))
    assert "  cause     detach   gone.py:3\n  why       w\n" in text


def test_a_cause_without_a_page_is_not_promised_one(folder: str) -> None:
    new = Finding(slug="no_such_page", severity="error", symptom="s", why="w", fix="f", primary=Span("model.py", 3))
    assert "gradctl cause" not in drawn(explanation(folder, new))


def test_a_place_that_is_named_twice_is_shown_once(folder: str) -> None:
    span = Span("train.py", 41, "called from")
    twice = Finding(slug="detach", severity="error", symptom="s", why="w", fix="f", evidence=(span, span))
    assert drawn(explanation(folder, twice)).count("train.py:41") == 1


def test_a_long_line_is_cut_on_a_terminal_and_whole_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "wide.py").write_text("x = " + "1 + " * 60 + "1  # end\n", encoding="utf-8")
    wide = Finding(slug="data", severity="error", symptom="s", why="w", fix="f", primary=Span("wide.py", 1))
    assert "# end" in drawn(explanation(str(tmp_path), wide), width=80)
    assert "# end" not in drawn(explanation(str(tmp_path), wide), width=80, terminal=True)


def test_a_path_outside_the_folder_is_found_too(folder: str, tmp_path: Path) -> None:
    other = tmp_path / "lib" / "ops.py"
    other.parent.mkdir()
    other.write_text("one\ntwo\n", encoding="utf-8")
    assert source(Span(str(other), 2), folder) == [(1, "one"), (2, "two")]


LAYERS = [
    f"encoder.layer.{n}.{part}.{kind}"
    for n in range(12)
    for part in ("attention.q", "attention.k", "mlp")
    for kind in ("weight", "bias")
]


def test_the_same_part_of_every_layer_is_one_pattern() -> None:
    meant = [name for name in LAYERS if ".attention." in name]
    assert collapse(meant, LAYERS) == ["encoder.layer.{0..11}.attention.*"]


def test_a_star_is_written_only_where_nothing_else_is_below() -> None:
    meant = [name for name in LAYERS if name.endswith("attention.q.weight")]
    assert collapse(meant, LAYERS) == ["encoder.layer.{0..11}.attention.q.weight"]
    assert collapse(LAYERS, LAYERS) == ["encoder.*"]
    assert collapse(LAYERS, [*LAYERS, "encoder.layer.3.mlp.scale"]) == [
        "encoder.layer.{0..2,4..11}.*",
        "encoder.layer.3.attention.*",
        "encoder.layer.3.mlp.{weight,bias}",
    ]


def test_a_star_for_names_that_no_optimizer_holds_stays_within_one_module() -> None:
    hidden = [f"net.layers.{n}.{kind}" for n in range(3) for kind in ("weight", "bias")]
    assert collapse(hidden, ["a.weight", "a.bias"]) == ["net.layers.{0..2}.*"]
    assert collapse(hidden, ["net.a.weight", "net.a.bias", *hidden]) == ["net.layers.{0..2}.*"]
    assert collapse(["scale", "shift"], ["a.weight"]) == ["{scale,shift}"]


def test_without_all_names_no_star_is_written() -> None:
    assert collapse(["a.weight", "a.bias"]) == ["a.{weight,bias}"]


@pytest.mark.parametrize(
    ("numbers", "written"),
    [([0, 1, 2, 3], "{0..3}"), ([0, 1], "{0,1}"), ([5, 3, 4, 9], "{3..5,9}"), ([0, 2, 4], "{0,2,4}"), ([7], "7")],
)
def test_numbers_are_written_as_ranges(numbers: list[int], written: str) -> None:
    assert collapse([f"layers.{n}.weight" for n in numbers]) == [f"layers.{written}.weight"]


def test_many_alternatives_are_counted() -> None:
    names = [f"{word}.weight" for word in "abcdefgh"]
    assert collapse(names) == ["{a,b,c,... 5 more}.weight"]


def test_no_names_are_no_patterns() -> None:
    assert collapse([], LAYERS) == []


words = st.sampled_from(["a", "b", "weight", "0", "1", "2", "3"])
fqns = st.lists(words, min_size=1, max_size=4).map(".".join)


@given(st.lists(fqns, unique=True, max_size=24), st.data())
def test_patterns_stand_for_the_names_that_are_meant_and_for_no_others(known: list[str], data: st.DataObject) -> None:
    meant = [name for name in known if data.draw(st.booleans())]
    patterns = collapse(meant, known)
    covered = {
        name for name in known for pattern in patterns for glob in _spelled(pattern) if fnmatch.fnmatch(name, glob)
    }
    assert covered == set(meant)


def _spelled(pattern: str) -> list[str]:
    """Expand braces as a shell does."""
    parts = [
        [choice for word in part[1:-1].split(",") for choice in _numbers(word)] if part.startswith("{") else [part]
        for part in re.findall(r"\{[^}]*\}|[^{}]+", pattern)
    ]
    return ["".join(choice) for choice in itertools.product(*parts)]


def _numbers(word: str) -> list[str]:
    first, dots, last = word.partition("..")
    return [str(n) for n in range(int(first), int(last) + 1)] if dots else [word]
