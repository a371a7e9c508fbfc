"""The report page without a browser: what stands in it, what cannot get into it, and its size."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import journals
from gradctl._errors import BadJournal
from gradctl._journal import Run
from gradctl._verdict import judge
from gradctl.report._axes import Scale, fit, log_ticks, short, step_ticks
from gradctl.report._heat import MOST_ROWS, brackets_of, rows_of
from gradctl.report._page import prose, render
from gradctl.report._png import data_uri
from gradctl.report._series import NO_GRADIENT, Curve, Samples
from gradctl.report._svg import element, path_data, spark_data
from journals import NAN, Trainer, header, write

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """The elements of a page, read by the standard library's parser; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            a for t, a in self.elements if t == tag and all(a.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]

    def text(self) -> str:
        return " ".join(" ".join(word for tag, word in self.words if tag not in ("script", "style")).split())


def draw(directory: Path) -> Page:
    run = Run.load(directory)
    page = render(run, judge(run))
    page.encode("utf-8")
    return Page(page)


def one_run(root: Path, steps: int = 60, **fields: Any) -> Path:
    """A run of one small optimizer, changed as told."""
    run = fields.pop("run", None)
    shapes = fields.pop("shapes", [[8, 16], [16], [16, 4], [4]])
    names = fields.pop("names", ["a.weight", "a.bias", "b.weight", "b.bias"])
    return write(root / "one", [Trainer(names, shapes, steps, **fields)], run=run)


def one(root: Path, steps: int = 60, **fields: Any) -> Page:
    """Its page."""
    return draw(one_run(root, steps, **fields))


def pixels(uri: str) -> tuple[int, int, bytes, list[tuple[int, ...]]]:
    """Width, height, palette indexes and palette of a picture, decoded from the format's own description."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 3)
    raw = zlib.decompress(chunks[b"IDAT"])
    rows = [raw[k * (width + 1) : (k + 1) * (width + 1)] for k in range(height)]
    assert all(row[0] == 0 for row in rows)
    plte = chunks[b"PLTE"]
    return width, height, b"".join(row[1:] for row in rows), [tuple(plte[k : k + 3]) for k in range(0, len(plte), 3)]


def heat(page: Page, kind: str) -> np.ndarray:
    """Palette indexes of one heat map, shape [rows, columns]: 0 no gradient, 1 zero, 2 NaN, 3 and up levels."""
    (image,) = page.all("image", class_=kind)
    width, height, data, _ = pixels(image["href"] or "")
    return np.frombuffer(data, dtype=np.uint8).reshape(height, width)


# ---------------------------------------------------------------------------------------------------------------------
# every run


@pytest.mark.parametrize("name", sorted(journals.ALL))
def test_every_kind_of_run_gives_a_page_that_names_no_address_and_runs_only_our_script(
    name: str, tmp_path: Path
) -> None:
    page = draw(journals.ALL[name](tmp_path))
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; ")
    scripts = page.all("script")
    programs = [word for tag, word in page.words if tag == "script" and "querySelector" in word]
    assert len(programs) == 1
    assert len(scripts) == 1 + len(page.all("script", type="application/json"))
    digest = base64.b64encode(hashlib.sha256(programs[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    for tag, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        for key in ("href", "src", "action", "xlink:href", "srcset", "data", "poster"):
            assert (attributes.get(key) or "data:").startswith("data:"), (tag, attributes)
    (styles,) = [word for tag, word in page.words if tag == "style"]
    assert "url(" not in styles
    assert "@import" not in styles
    assert not re.search(
        r'="[^"]*\b(nan|inf)\b', "".join(re.findall(r"<path[^>]*>|<rect[^>]*>|<text[^>]*>|<circle[^>]*>", page.html))
    )


@pytest.mark.parametrize("name", sorted(journals.ALL))
def test_the_page_says_the_sentence_the_figures_and_the_findings_of_the_verdict(name: str, tmp_path: Path) -> None:
    run = Run.load(journals.ALL[name](tmp_path))
    verdict = judge(run)
    words = Page(render(run, verdict)).text().replace(" :", ":")
    plain = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", words)
    for said in [verdict.sentence, *(f.value for f in verdict.figures), *(f.symptom for f in verdict.shown)]:
        said = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", " ".join(said.split()))
        assert "".join(said.replace("`", "").split()) in "".join(plain.split()), said


def test_nothing_that_a_program_can_choose_becomes_markup(tmp_path: Path) -> None:
    page = draw(journals.hostile(tmp_path))
    assert not page.all("img")
    assert not page.all("b", class_="x")
    assert not page.all("i", class_="")
    assert {tag for tag, _ in page.elements} <= {
        "article", "bdi", "body", "button", "circle", "code", "dd", "desc", "details", "div", "dl", "dt", "footer", "g",
        "h1", "h2", "h3", "head", "header", "html", "i", "image", "input", "label", "li", "lineargradient", "link",
        "main", "meta", "p", "path", "rect", "script", "section", "small", "span", "stop", "style", "summary", "svg",
        "table", "tbody", "td", "text", "th", "thead", "title", "tr", "ul", "b",
    }  # fmt: skip
    assert "alert(" in page.text()  # it is shown, as text
    assert "\x1b" not in page.html
    assert "\u202e" not in page.html
    assert "\x07" not in page.html
    (data,) = [word for tag, word in page.words if tag == "script" and word.startswith("{")]
    assert "<" not in data


def test_names_that_utf_8_cannot_write_are_shown_with_a_replacement(tmp_path: Path) -> None:
    page = one(tmp_path, names=["a\udcff.weight", "‏שלום.weight", "c" * 500 + ".weight", None])
    assert "a\ufffd.weight" in page.text()
    assert "שלום" in page.text()
    assert "tensor 3" in page.text()
    longest = max((word for tag, word in page.words if tag == "code"), key=len)
    assert len(longest) <= 120


# ---------------------------------------------------------------------------------------------------------------------
# edges


def flat(value: float | None, tensors: int = 4) -> Callable[[int], list[float | None]]:
    return lambda step: [value] * tensors


def test_a_run_of_one_step_is_drawn(tmp_path: Path) -> None:
    page = one(tmp_path, steps=1)
    assert heat(page, "absolute").shape == (2, 1)


def test_a_run_that_is_nan_throughout_is_red_throughout(tmp_path: Path) -> None:
    page = one(tmp_path, norms=flat(NAN), loss=lambda step: NAN)
    assert (heat(page, "absolute") == 2).all()
    assert (heat(page, "relative") == 2).all()
    assert "no finite loss was passed to backward" in page.text()


def test_zero_and_missing_gradients_have_colours_of_their_own(tmp_path: Path) -> None:
    page = one(tmp_path, norms=lambda step: [0.0, 0.0, None, None])
    assert (heat(page, "absolute")[0] == 1).all()
    assert (heat(page, "absolute")[1] == 0).all()
    assert "no gradient" in page.text()


def test_a_dead_run_stays_red_between_measurements() -> None:
    samples = Samples(np.array([1, 5]), np.array([1, 5]), np.array([[1.0], [math.nan]]))
    cells = samples.paint(10, 10)
    assert cells[0, :4].tolist() == [1.0] * 4
    assert np.isnan(cells[0, 4:]).all()


def test_a_cell_holds_the_largest_value_of_its_steps() -> None:
    samples = Samples(np.arange(1, 101), np.arange(1, 101), np.array([[1.0 if k != 57 else 9.0] for k in range(100)]))
    assert samples.paint(10, 100)[0].tolist() == [1, 1, 1, 1, 1, 9, 1, 1, 1, 1]


def test_rows_combine_the_tensors_of_a_module_as_the_root_of_their_squares(tmp_path: Path) -> None:
    page = one(tmp_path, norms=lambda step: [3.0, 4.0, 5.0, 0.0])
    cells = heat(page, "absolute")
    assert cells.shape[0] == 2
    assert abs(int(cells[0, 0]) - int(cells[1, 0])) <= 1  # codes are within 1.2 %


def test_one_outlier_neither_flattens_the_loss_nor_is_hidden(tmp_path: Path) -> None:
    page = one(tmp_path, steps=300, loss=lambda step: 1.6e4 if step == 150 else 2.0 + 1 / step)
    assert "up to 1.6e+04, off scale" in page.text()


def test_one_outlier_does_not_flatten_a_run_of_few_blocks(tmp_path: Path) -> None:
    page = one(tmp_path, steps=9, loss=lambda step: 1e36 if step == 5 else 0.6 + 0.01 * step)
    assert "up to 1e+36, off scale" in page.text()
    assert "log scale" not in page.text()


@pytest.mark.parametrize("level", [1e308, -1e308, -5.0, 0.0, 1e-300])
def test_losses_of_any_size_and_sign_are_drawn(level: float, tmp_path: Path) -> None:
    page = one(tmp_path, loss=lambda step: level * (1 if step % 2 else 0.5))
    (curve,) = [a["d"] for a in page.all("path", class_="mean")]
    assert curve
    assert "nan" not in curve


def test_a_program_without_an_optimizer_says_that_backwards_are_steps(tmp_path: Path) -> None:
    assert "each backward counts as a step" in draw(journals.no_optimizer(tmp_path)).text()


def test_training_that_was_not_seen_is_never_shown_as_an_empty_chart(tmp_path: Path) -> None:
    page = draw(journals.not_seen(tmp_path))
    assert not page.all("svg", id="run")
    assert "distributed autograd" in page.text()
    assert "No training step was seen" in page.text()


def test_a_killed_run_says_what_its_journal_lacks(tmp_path: Path) -> None:
    words = draw(journals.killed(tmp_path)).text()
    assert "no end record" in words
    assert "it is cut" in words


def test_the_other_player_of_a_game_has_a_row(tmp_path: Path) -> None:
    words = draw(journals.gan(tmp_path)).text()
    assert "Also trained" in words
    assert "Discriminator" in words


def test_ranks_are_rows_and_the_late_one_is_marked(tmp_path: Path) -> None:
    page = draw(journals.two_ranks(tmp_path))
    assert len(page.all("span", class_="late")) == 1
    assert re.search(r"1 late box · pid 901", page.text())


def test_a_rank_that_left_no_journal_still_has_a_row(tmp_path: Path) -> None:
    directory = journals.two_ranks(tmp_path)
    (directory / "journal.rank1.jsonl").unlink()
    assert "left no journal" in draw(directory).text()


def test_the_first_bad_step_is_one_line_through_everything(tmp_path: Path) -> None:
    page = draw(journals.diverged(tmp_path, bad=18, steps=260))
    (bad,) = page.all("path", class_="bad")
    x = float(re.match(r"M([\d.]+) ", bad["d"] or "")[1])  # type: ignore[index]
    assert x == pytest.approx(172 + (1062 - 172) * 17 / 260, abs=0.1)
    first_red = int(np.argmax((heat(page, "absolute") == 2).any(axis=0)))
    assert first_red == 17 * 240 // 260


def test_a_stretch_with_nan_is_red_only_from_the_first_bad_step(tmp_path: Path) -> None:
    directory = one_run(tmp_path, steps=4)
    path = directory / "journal.rank0.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"k":"end"' not in line and '"k":"mx"' not in line]
    lines.append('{"k":"event","e":"nonfinite","t":2,"o":0,"n":6,"what":"grad","params":[],"count":1,"of":4}')
    lines.append('{"k":"mx","o":0,"n":1,"to":10,"c":9,"g":["nan","nan","nan","nan"]}')
    lines.append('{"k":"b","o":0,"n":5,"c":6,"t":2,"l":[1,1,1],"bad":0,"mb":6,"ms":[1,1,0,0]}')
    path.write_text("\n".join(lines) + "\n")
    assert (heat(draw(directory), "absolute") == 2).tolist() == [[False] * 5 + [True] * 5] * 2


def test_optimizers_that_step_together_are_drawn_as_one(tmp_path: Path) -> None:
    shapes = [[8, 8], [8]]
    last = Trainer(["b.weight", "b.bias"], shapes, 40, id=1)
    first = Trainer(["a.weight", "a.bias"], shapes, 40, id=0, loss=lambda step: None, microbatches=0)
    page = draw(write(tmp_path / "stages", [first, last]))
    assert "2 optimizers step together and are drawn as one" in page.text()
    assert heat(page, "absolute").shape[0] == 2
    assert "Also trained" not in page.text()


def test_more_than_a_thousand_tensors_are_cut_and_the_odd_ones_are_kept(tmp_path: Path) -> None:
    count = 1500
    page = one(
        tmp_path, steps=8, names=[f"l.{k}.weight" for k in range(count)], shapes=[[2, 2]] * count,
        norms=lambda step: [NAN if k == 1400 else 1.0 for k in range(count)],
    )  # fmt: skip
    assert "500 more tensors are in the journal" in page.text()
    assert "l.1400.weight" in page.text()
    assert "l.1200.weight" not in page.text()
    assert heat(page, "absolute").shape[0] <= MOST_ROWS


ODD_VALUES = (
    0, -1, 2, 1e308, -1e308, 1e-320, NAN, math.inf, "nan", "", None, [], {}, 1 << 61, -(1 << 61), True, "x" * 600,
    "\ud800", "<b>", [None], [1e308] * 3, -999, 30_000,
)  # fmt: skip


def changed(value: Any, random: Random) -> Any:
    """The value with something odd somewhere in it, or left out."""
    if isinstance(value, dict | list) and value and random.random() < 0.8:
        changeable = dict(value) if isinstance(value, dict) else list(value)
        key = random.choice(list(changeable) if isinstance(value, dict) else range(len(value)))
        if random.random() < 0.1:
            del changeable[key]
        else:
            changeable[key] = changed(changeable[key], random)
        return changeable
    return random.choice(ODD_VALUES)


@settings(max_examples=60)
@given(st.randoms(use_true_random=False), st.sampled_from(["hostile", "gan", "diverged", "two_ranks"]))
def test_a_journal_with_anything_anywhere_gives_a_page(random: Random, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build: Any = journals.ALL[name]
        directory = build(Path(folder), steps=24)
        for path in directory.glob("*.jsonl"):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            for _ in range(random.choice([1, 3, 20])):
                at = random.randrange(len(records))
                records[at] = changed(records[at], random)
            path.write_text("\n".join(json.dumps(record) for record in records))
        try:
            run = Run.load(directory)
        except BadJournal:
            return  # nothing in it could be read, which is said by the reader
        verdict = judge(run)
        text = Page(render(run, verdict)).html
        assert text.encode("utf-8").rstrip().endswith(b"</html>")
        assert verdict.sentence
        assert "<script>alert" not in text


def test_hostile_step_numbers_neither_stop_nor_slow_the_drawing(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=30, blocks=1)
    with open(directory / "journal.rank0.jsonl", "a") as file:
        file.write('{"k":"row","o":0,"n":2305843009213693951,"t":1,"g":[1,2,3],"lr":[1e400,"nan"]}\n')
        file.write('{"k":"mx","o":0,"n":1,"to":4611686018427387903,"c":1,"g":[1]}\n')
        file.write(
            '{"k":"b","o":0,"n":31,"c":4611686018427387900,"t":1,"l":[1e300,-1e300,1e308],"ms":[1e308,1e308,-1,0]}\n'
        )
    text = draw(directory).html
    assert "</html>" in text
    assert not re.search(r'\b(?:x|y|x1|x2|y1|y2|cx|cy|width|height|d|points)="[^"]*(?:nan|inf)', text)


# ---------------------------------------------------------------------------------------------------------------------
# size


def test_52_tensors_and_400_steps_take_less_than_200_kilobytes(tmp_path: Path) -> None:
    assert len(draw(journals.healthy(tmp_path)).html.encode()) <= 200_000


def test_1000_tensors_take_less_than_500_kilobytes(tmp_path: Path) -> None:
    assert len(draw(journals.large(tmp_path, steps=600)).html.encode()) <= 500_000


def test_the_page_is_drawn_without_torch(tmp_path: Path, pytester: pytest.Pytester) -> None:
    directory = journals.healthy(tmp_path, steps=20, blocks=1)
    program = (
        "import sys; from gradctl._journal import Run; from gradctl._verdict import judge\n"
        "from gradctl.report._page import render\n"
        f"run = Run.load({str(directory)!r}); assert render(run, judge(run)); assert 'torch' not in sys.modules\n"
    )
    pytester.makepyfile(program=program)
    assert pytester.runpython("program.py").ret == 0


# ---------------------------------------------------------------------------------------------------------------------
# parts


def test_rows_are_modules_in_model_order_and_brackets_their_blocks() -> None:
    names, _ = journals.gpt(2)
    labels = [label for label, _ in rows_of(names)]
    assert labels[:4] == ["transformer.wte", "transformer.wpe", "transformer.h.0.ln_1", "transformer.h.0.attn.c_attn"]
    assert [(b.label, b.first, b.rows) for b in brackets_of(labels)] == [
        ("wte", 0, 1), ("wpe", 1, 1), ("h.0", 2, 6), ("h.1", 8, 6), ("ln_f", 14, 1),
    ]  # fmt: skip


@given(st.lists(st.one_of(st.none(), st.text(alphabet="ab.0", max_size=9)), min_size=1, max_size=300))
def test_every_tensor_is_in_exactly_one_row_whatever_its_name(names: list[str | None]) -> None:
    rows = rows_of(names)
    assert len(rows) <= MOST_ROWS
    assert sorted(index for _, members in rows for index in members) == list(range(len(names)))
    brackets = brackets_of([label for label, _ in rows])
    assert sum(b.rows for b in brackets) == len(rows)


@given(st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=9))
def test_a_picture_decodes_to_the_cells_it_was_made_from(cells: list[list[int]]) -> None:
    palette = [(k, 2 * k, 255 - k) for k in range(6)]
    width, height, data, colours = pixels(data_uri([bytes(row) for row in cells], palette))
    assert (width, height, colours) == (7, len(cells), palette)
    assert data == b"".join(bytes(row) for row in cells)


def test_a_picture_without_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of one length"):
        data_uri([b"ab", b"a"], [(0, 0, 0)])


@given(st.integers(1, 1 << 62))
def test_a_step_axis_has_at_most_four_ticks_and_ends_at_the_last_step(last: int) -> None:
    ticks = step_ticks(last)
    assert 1 <= len(ticks) <= 4
    assert ticks[-1] == last
    assert ticks == sorted(set(ticks))
    assert ticks[0] >= 1


@given(st.floats(1e-30, 1e30), st.floats(1.0001, 1e40))
def test_log_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert len(ticks) <= 5
    assert all(low * 0.999 <= t <= low * ratio * 1.001 for t in ticks)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60))
def test_a_fitted_scale_maps_everything_onto_its_lane(values: list[float]) -> None:
    scale, _, _ = fit(values, 100.0, 0.0)
    for value in values:
        assert math.isnan(value) or 0.0 <= scale(value) <= 100.0
    assert len(scale.ticks()) <= 5


def test_thinning_keeps_extremes_and_the_weighted_mean() -> None:
    curve = Curve.of((float(k), 1.0 if k != 700 else 50.0, 0.5, 2.0 if k != 700 else 99.0, 1.0) for k in range(1, 1001))
    thin = curve.thinned(50, 1000)
    assert len(thin.x) <= 50
    assert thin.high.max() == 99.0
    assert float((thin.y * thin.weight).sum() / thin.weight.sum()) == pytest.approx(1.049)


def test_a_centred_mean_does_not_lag_a_straight_line() -> None:
    curve = Curve.of((float(k), 100.0 - k, 100.0 - k, 100.0 - k, 1.0) for k in range(100))
    assert curve.centred_mean(0.1) == pytest.approx(curve.y)


def test_paths_break_where_nothing_was_measured() -> None:
    assert path_data([0, 1, 2, 3, 4], [1, 2, math.nan, 4, 5]) == "M0 1L1 2M3 4L4 5"
    assert path_data([5], [5]) == "M4 5h2"
    assert spark_data([1.0], 10, 10) == ""
    assert spark_data([1.0, 2.0], 10, 10) == "m0 10l10-10"


def test_elements_escape_text_and_attributes() -> None:
    assert str(element("text", "<&", class_='"x')) == '<text class="&#34;x">&lt;&amp;</text>'


def test_prose_sets_names_and_backticks_as_code_and_escapes_the_rest() -> None:
    said = prose("`a<b` moves h.0.weight and xh.0.weight <i>", ("h.0.weight",))
    assert said == "<code>a&lt;b</code> moves <code>h.0.weight</code> and xh.0.weight &lt;i&gt;"


def test_a_scale_clamps_and_keeps_nan() -> None:
    scale = Scale(1.0, 100.0, 50.0, 0.0, log=True)
    assert (scale(10.0), scale(0.0), scale(1e9)) == (25.0, 50.0, 0.0)
    assert math.isnan(scale(math.nan))


def test_numbers_are_written_as_the_verdict_writes_them() -> None:
    from gradctl._verdict._words import number

    for value in (4.434, 0.0003, 1.63e4, 16_300.0, 0.0, 1e-7, 123456.0):
        assert short(value) == number(value)
    assert NO_GRADIENT < 0
    assert short(-2.5) == "−2.5"
    assert short(None) == "–"


def test_header_without_a_start_time_is_drawn(tmp_path: Path) -> None:
    assert "UTC" not in one(tmp_path, run=header(started=0.0)).text()
    (tmp_path / "one" / "journal.rank0.jsonl").unlink()
    assert "unknown time" in one(tmp_path, run=header(started=1e300)).text()
