from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import journals
from gradctl import report
from gradctl._errors import UsageError
from gradctl._journal import Run
from gradctl.report._text import clean
from journals import Trainer, event, gpt

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


def drawn(directory: Path, *, width: int = 80, encoding: str = "utf-8", terminal: bool = False, **more) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    console = Console(file=file, width=width, force_terminal=terminal, legacy_windows=False, _environ={})
    report.draw_terminal(Run.load(directory), console=console, **more)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_the_sentence_comes_first_then_figures_findings_layers_and_places(tmp_path: Path) -> None:
    directory = journals.diverged(tmp_path)
    text = drawn(directory, page=directory / "report.html")
    order = [
        "● Gradients became NaN at step 18; nothing was learned after it.",
        "broken.py · exit 0 · 29 s · torch 2.13.0+cpu · 1 rank · 2026-",
        "parameters reached  76 / 76",
        "bad   Gradients became NaN or inf at step 18",
        "→ gradctl explain --at-step 18 broken.py",
        "look  26 of 26 weight matrices",
        "layer   ",
        "           NaN\n",
        f"report   {directory}/report.html",
        f"journal  {directory}/journal.rank0.jsonl",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert text.startswith(order[0])


@pytest.mark.parametrize("kind", journals.ALL)
def test_a_pipe_gets_plain_text_of_eighty_columns(tmp_path: Path, kind: str) -> None:
    text = drawn(journals.ALL[kind](tmp_path))
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if not line.startswith(("  journal  ", "  report   "))]
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("kind", ["healthy", "two_ranks", "hostile"])
@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_other_widths_are_kept_down_to_forty(tmp_path: Path, kind: str, width: int) -> None:
    lines = drawn(journals.ALL[kind](tmp_path), width=width).splitlines()
    assert max(len(line) for line in lines if "journal.rank0" not in line) <= max(40, width)


def test_a_terminal_gets_colour_by_severity(tmp_path: Path) -> None:
    assert "\x1b[1;31m● Gradients became NaN" in drawn(journals.diverged(tmp_path), terminal=True)
    assert "\x1b[1;32m● Gradients reach every" in drawn(journals.healthy(tmp_path), terminal=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("kind", ["healthy", "hostile", "two_ranks"])
def test_an_encoding_without_our_signs_gets_others(tmp_path: Path, kind: str, encoding: str) -> None:
    text = drawn(journals.ALL[kind](tmp_path), encoding=encoding)
    assert "gradient" in text
    if encoding == "ascii":
        assert text.isascii()
        assert "* " in text[:2]
        assert "->" in text


def test_at_most_four_findings_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    names, shapes = gpt(4)
    events = [
        event("none", 9.0, o=0, n=200, params=["a"], count=1),
        event("unoptimized", 9.0, o=0, n=3, params=["x"], count=1),
        event("stall", 9.0, o=0, n=60, params=names[:38], count=38, share=0.97),
        event("torn_step", 9.0, thread="t", site="a.py:1"),
        event("fault", 2.0, where="rows", trace="..."),
    ]
    one = Trainer(list(names), shapes, 200, clip=1e-6)
    text = drawn(journals.write(tmp_path, [one], events=events, saved=journals.SAVED_BY_OP))
    assert len(re.findall(r"^  (?:bad|look|tip) ", text, re.MULTILINE)) == 4
    assert re.search(r"and [1-9] more findings?: gradctl report .* --json -", text)


def test_several_ranks_are_rows_and_the_late_one_is_marked(tmp_path: Path) -> None:
    text = drawn(journals.two_ranks(tmp_path))
    assert re.search(r"^  0 +200 +20 ms +10 ms +9\.2 ms +4\.2 → 2\.\d+ +exit 0$", text, re.MULTILINE)
    assert re.search(r"^  1 late +200 +20 ms +6 ms +13\.2 ms ", text, re.MULTILINE)
    assert "2 ranks" in text


def test_ranks_of_other_machines_are_counted_as_missing_here(tmp_path: Path) -> None:
    for rank in (0, 1):
        run = journals.header(rank=rank, world_size=8)
        journals.write(tmp_path, [Trainer(["a.w"], [[2, 2]], 3)], run=run, name=f"journal.rank{rank}.jsonl")
    assert "2 of 8 ranks" in drawn(tmp_path)


def test_many_ranks_are_cut_with_a_count(tmp_path: Path) -> None:
    for rank in range(40):
        run = journals.header(rank=rank, world_size=40)
        journals.write(tmp_path, [Trainer(["a.w"], [[2, 2]], 3)], run=run, name=f"journal.rank{rank}.jsonl")
    text = drawn(tmp_path)
    assert "and 24 more" in text
    assert len(text.splitlines()) < 60


def test_nothing_that_a_program_chose_reaches_the_terminal_as_a_command(tmp_path: Path) -> None:
    text = drawn(journals.hostile(tmp_path))
    assert not CONTROL.search(text)
    assert "[bold]argv[/bold]" in text  # markup is shown, never obeyed
    assert "[link=http://evil.example]l[/link]" in text
    coloured = drawn(tmp_path / "hostile", terminal=True)
    assert "\x1b[31m\x07" not in coloured
    assert "\x1b[2J" not in coloured
    assert "\x1b]" not in coloured


@given(st.text(max_size=60))
def test_cleaned_text_is_one_printable_line(text: str) -> None:
    for encoding in ("utf-8", "ascii", "latin-1", "no-such-encoding"):
        cleaned = clean(text, encoding=encoding)
        assert not CONTROL.search(cleaned)
        assert len(cleaned.splitlines()) <= 1
        cleaned.encode("utf-8")
        if encoding in ("ascii", "latin-1"):
            cleaned.encode(encoding)


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=60))
def test_text_that_is_harmless_is_left_as_it_is(text: str) -> None:
    assert clean(text) == text


def test_names_of_any_length_and_script_fit(tmp_path: Path) -> None:
    names = ["編碼器.層.三.注意力.權重" * 9, "é" * 5000, "\ud800lone", "a" * 5000]
    one = Trainer(list(names), [[8, 8]] * 4, 60)
    events = [event("none", 9.0, o=0, n=60, params=names, count=4)]
    text = drawn(journals.write(tmp_path, [one], events=events))
    assert "層" in text
    from rich.cells import cell_len

    assert max(cell_len(line) for line in text.splitlines() if "journal.rank0" not in line) <= 80


def test_an_exit_code_that_nobody_knows_is_said_to_be_unknown(tmp_path: Path) -> None:
    one = Trainer(["a.w"], [[2, 2]], 30)
    text = drawn(journals.write(tmp_path, [one], end=journals.goodbye({0: 30}, code=None)))
    assert "train.py --steps 400 · exit code not known ·" in text.replace("\n", " ")


def test_what_was_not_seen_has_a_line(tmp_path: Path) -> None:
    one = Trainer(["a.w"], [[2, 2]], 30)
    unseen = [["2 Python children", "they were started with -I"], ["a thread", "gone"]]
    text = drawn(journals.write(tmp_path, [one], end=journals.goodbye({0: 30}, not_seen=unseen)))
    assert "\n  unseen   2 Python children (they were started with -I); and 1 more\n" in text
    assert "unseen" not in drawn(journals.healthy(tmp_path))


def report_again(directory: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradctl", "report", str(directory), *more]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_a_page_that_is_kept_is_said_to_be_an_old_one(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    line = f"  report   {directory}/report.html"
    assert f"{line}\n" in report_again(directory).stdout
    assert f"{line}  (kept; --force draws it again)\n" in report_again(directory).stdout
    assert f"{line}\n" in report_again(directory, "--force").stdout


@pytest.mark.parametrize("more", [[], ["--json", "-"]])
def test_a_directory_whose_only_journal_is_empty_holds_no_run(tmp_path: Path, more: list[str]) -> None:
    directory = journals.empty(tmp_path)
    done = report_again(directory, *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{directory} holds no run" in done.stderr
    assert "its journal is empty" in done.stderr
    assert not (directory / "report.html").exists()


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_page_is_written_whole_and_for_its_owner_only(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    path = report.write_page(Run.load(directory), directory / "report.html")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in directory.iterdir()) == ["journal.rank0.jsonl", "report.html"]


def test_a_page_that_exists_is_kept_unless_it_is_forced(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    (directory / "mine.html").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.html exists and is not overwritten"):
        report.write_page(Run.load(directory), directory / "mine.html", force=False)
    assert (directory / "mine.html").read_text() == "mine"
    report.write_page(Run.load(directory), directory / "mine.html", force=True)
    assert "<html" in (directory / "mine.html").read_text()


@pytest.mark.parametrize("place", ["gone/report.html", "."])
def test_a_page_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path, place: str) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    with pytest.raises(UsageError, match="cannot write"):
        report.write_page(Run.load(directory), directory / place)
    assert [p.name for p in directory.iterdir()] == ["journal.rank0.jsonl"]


def test_a_page_may_go_to_a_device(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    assert report.write_page(Run.load(directory), "/dev/null") == Path("/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("kind", journals.ALL)
def test_every_run_has_a_page(tmp_path: Path, kind: str) -> None:
    directory = journals.ALL[kind](tmp_path)
    assert report.write_page(Run.load(directory), directory / "report.html").stat().st_size > 1000


def test_at_exit_the_summary_goes_to_stderr_and_the_page_to_the_run(tmp_path: Path, capfd) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    report.draw_at_exit(directory)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("● Gradients reach every parameter")
    assert f"report   {directory}/report.html" in err
    assert (directory / "report.html").exists()


def test_at_exit_quiet_says_nothing_and_no_page_writes_none(tmp_path: Path, capfd) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    report.draw_at_exit(directory, quiet=True, html=False)
    assert capfd.readouterr() == ("", "")
    assert not (directory / "report.html").exists()


@pytest.mark.parametrize("break_it", ["gone", "empty", "unwritable"])
def test_at_exit_nothing_is_raised_whatever_happens(tmp_path: Path, capfd, break_it: str) -> None:
    directory = tmp_path / "run"
    if break_it != "gone":
        directory.mkdir()
    if break_it == "unwritable":
        journals.write(directory, [Trainer(["a.w"], [[2, 2]], 30)])
        (directory / "report.html").mkdir()
    report.draw_at_exit(directory)
    out, err = capfd.readouterr()
    assert out == ""
    assert "gradctl: no report of" in err
    assert "Traceback" not in err
    if break_it == "unwritable":
        assert "● Gradients reach every parameter" in err


def test_drawing_imports_no_torch(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=30)
    code = "import sys; from gradctl import report; report.draw_at_exit(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n"
