"""The report page in Debian's chromium: it asks nobody for anything, and everything on it works."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

import journals
from gradctl._journal import Run
from gradctl._verdict import judge
from gradctl.report._page import render

pytestmark = pytest.mark.browser

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDE: ViewportSize = {"width": 1180, "height": 900}
PHONE: ViewportSize = {"width": 360, "height": 740}
RUNS = ("healthy", "diverged", "gan", "two_ranks", "killed", "hostile", "never_reached", "not_seen", "empty", "raised")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the module; its event loop must be gone before tests that need one of their own."""
    where = shutil.which("chromium")
    assert where, "chromium is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=where, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The file address of a drawn page for each kind of run."""
    root = tmp_path_factory.mktemp("pages")
    found: dict[str, str] = {}
    for name, build in (*journals.ALL.items(), ("large", lambda at: journals.large(at, steps=400))):
        run = Run.load(build(root))
        file = root / f"{name}.html"
        file.write_text(render(run, judge(run)), encoding="utf-8")
        found[name] = file.as_uri()
    return found


@dataclass
class Opened:
    """A page, and everything it asked for or complained of."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def box(self, selector: str) -> dict[str, float]:
        """The place of an element in pixels, which must be there."""
        found = self.page.locator(selector).first.bounding_box()
        assert found is not None, selector
        return dict(found)


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Browser, pages: dict[str, str]) -> Iterator[Open]:
    """Open the page of a run by name; afterwards no request but the file itself, and no word on the console."""
    contexts = []
    everything: list[Opened] = []

    def open_(name: str, *, viewport: ViewportSize = WIDE, scheme: str = "light", scripts: bool = True) -> Opened:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, java_script_enabled=scripts)  # type: ignore[arg-type]
        contexts.append(context)
        context.route(lambda address: not address.startswith(("file:", "data:")), lambda route: route.abort())
        this = Opened(context.new_page())
        everything.append(this)
        this.page.on("request", lambda request: this.requests.append(request.url))
        this.page.on("console", lambda message: this.complaints.append(message.text))
        this.page.on("pageerror", lambda error: this.complaints.append(str(error)))
        this.page.goto(pages[name])
        this.requests.remove(pages[name])
        return this

    yield open_
    for context in contexts:
        context.close()
    for this in everything:
        assert [address for address in this.requests if not address.startswith("data:")] == []
        assert this.complaints == []


@pytest.mark.parametrize("name", RUNS)
def test_every_page_opens_without_a_request_or_a_word_on_the_console(name: str, opened: Open) -> None:
    this = opened(name)
    assert this.page.locator("h1").inner_text()
    assert this.page.locator("#theme").is_visible()  # the script ran, so the policy lets it


@pytest.mark.parametrize("name", ["healthy", "diverged", "two_ranks", "hostile", "not_seen"])
def test_nothing_overflows_a_phone(name: str, opened: Open) -> None:
    this = opened(name, viewport=PHONE)
    assert this.page.evaluate("document.documentElement.scrollWidth") <= 360
    outside = this.page.evaluate(
        """() => [...document.querySelectorAll("body *")]
             .filter(e => !e.closest(".wide, .hidden") && e.getBoundingClientRect().right > 361)
             .map(e => e.tagName + "." + e.className)"""
    )
    assert outside == []


def test_the_chart_scrolls_in_its_own_frame_on_a_phone(opened: Open) -> None:
    this = opened("healthy", viewport=PHONE)
    inner, outer = this.page.evaluate("(e => [e.scrollWidth, e.clientWidth])(document.querySelector('.wide'))")
    assert inner >= 720 > outer


def test_the_tooltip_names_step_loss_and_the_cell_below_the_pointer(opened: Open) -> None:
    this = opened("healthy")
    chart = this.box("#run")
    x = chart["x"] + chart["width"] * (172 + 890 * (199.5 / 400)) / 1080
    this.page.mouse.move(x, chart["y"] + 60)
    tip = this.page.locator("#tip")
    tip.wait_for(state="visible")
    assert tip.inner_text().startswith("step 200\nloss  2.")
    image = this.box("image.absolute")
    this.page.wait_for_function("() => true")
    this.page.mouse.move(x, image["y"] + 3)
    name, _, value = tip.inner_text().split("\n")[-1].partition("  ")
    assert name == "transformer.wte"
    assert 0.1 < float(value) < 1.0  # what the synthetic run was made of
    this.page.mouse.move(3, 3)
    tip.wait_for(state="hidden")


def test_the_tooltip_stays_inside_the_window_at_the_right_edge(opened: Open) -> None:
    this = opened("healthy")
    chart = this.box("#run")
    this.page.mouse.move(chart["x"] + chart["width"] * 1061 / 1080, chart["y"] + 60)
    this.page.locator("#tip").wait_for(state="visible")
    tip = this.box("#tip")
    assert tip["x"] + tip["width"] <= 1180
    assert this.page.evaluate("document.documentElement.scrollWidth") <= 1180


def test_the_chart_can_be_read_with_the_keyboard(opened: Open) -> None:
    this = opened("healthy")
    this.page.locator("#run").focus()
    this.page.keyboard.press("ArrowRight")
    assert this.page.locator("#tip").inner_text().startswith("step 5\n")
    this.page.keyboard.press("Escape")
    assert this.page.locator("#tip").is_hidden()


@pytest.mark.parametrize("scripts", [True, False])
def test_the_toggle_switches_the_heat_map_with_and_without_scripts(scripts: bool, opened: Open) -> None:
    this = opened("healthy", scripts=scripts)
    assert this.page.locator("image.absolute").is_visible()
    assert not this.page.locator("image.relative").is_visible()
    this.page.locator("label[for=relative]").click()
    assert this.page.locator("image.relative").is_visible()
    assert not this.page.locator("image.absolute").is_visible()
    this.page.locator("#relative").focus()
    this.page.keyboard.press("ArrowLeft")
    assert this.page.locator("image.absolute").is_visible()


def test_a_click_on_a_head_sorts_the_layers_and_a_second_turns_them_round(opened: Open) -> None:
    this = opened("healthy")
    values = "[...document.querySelectorAll('#layers tbody tr')].map(r => Number(r.cells[2].dataset.v))"
    before = this.page.evaluate(values)
    head = this.page.locator("#layers th", has_text="median norm")
    head.locator("button").click()
    assert this.page.evaluate(values) == sorted(before, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").press("Enter")
    assert this.page.evaluate(values) == sorted(before)
    names = "[...document.querySelectorAll('#layers tbody tr')].map(r => r.cells[0].textContent)"
    this.page.locator("#layers th", has_text="name").locator("button").click()
    assert this.page.evaluate(names)[:2] == ["transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.weight"]


def lightness(page: Page, selector: str, what: str) -> float:
    """Perceived lightness of a computed colour, 0 to 1."""
    return page.evaluate(
        """([selector, what]) => {
          const context = document.createElement("canvas").getContext("2d");
          context.fillStyle = getComputedStyle(document.querySelector(selector))[what];
          context.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        }""",
        [selector, what],
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_drawn_with_enough_contrast(scheme: str, opened: Open) -> None:
    this = opened("diverged", scheme=scheme)
    behind = lightness(this.page, "body", "backgroundColor")
    assert (behind > 0.8) if scheme == "light" else (behind < 0.02)
    for selector, what in (
        ("h1", "color"), (".sub", "color"), (".meta p", "color"), (".figures dt", "color"), ("#layers th", "color"),
        (".vector th", "color"), (".flag", "color"), ("footer dd", "color"), (".chart text", "fill"),
        (".on-bad", "fill"),
    ):  # fmt: skip
        light = lightness(this.page, selector, what)
        ratio = (max(light, behind) + 0.05) / (min(light, behind) + 0.05)
        assert ratio >= 4.5, (selector, ratio)


def test_the_button_turns_the_scheme(opened: Open) -> None:
    this = opened("healthy", scheme="dark")
    assert lightness(this.page, "body", "backgroundColor") < 0.02
    this.page.locator("#theme").click()
    assert lightness(this.page, "body", "backgroundColor") > 0.8


def test_without_scripts_the_table_the_sentence_and_the_chart_are_there(opened: Open) -> None:
    this = opened("healthy", scripts=False)
    assert this.page.locator("h1").is_visible()
    assert this.page.locator("#run").is_visible()
    assert this.page.locator("#layers tbody tr").count() == 52
    assert this.page.locator("#layers tbody tr").first.locator("td").nth(1).inner_text() != ""
    assert not this.page.locator("#theme").is_visible()  # a button that would do nothing is not offered


def test_a_page_of_a_thousand_tensors_opens(opened: Open) -> None:
    this = opened("large")
    assert this.page.locator("#layers tbody tr").count() == 1000
    assert this.page.evaluate("document.documentElement.scrollHeight") < 5000  # the table scrolls in its own frame


def test_no_text_of_the_chart_lies_on_another(opened: Open) -> None:
    for name in ("healthy", "diverged", "gan", "two_ranks", "never_reached", "raised"):
        this = opened(name)
        clashes = this.page.evaluate(
            """() => {
              const boxes = [...document.querySelectorAll("#run text")].filter(e => e.getClientRects().length)
                .map(e => [e.textContent, e.getBoundingClientRect()]);
              const found = [];
              boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
                const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (wide > 1 && high > 5) found.push(a + " / " + b);
              }));
              return found;
            }"""
        )
        assert clashes == [], (name, clashes)


def test_a_printed_page_is_light_and_whole(opened: Open) -> None:
    this = opened("healthy", scheme="dark")
    this.page.emulate_media(media="print")
    assert lightness(this.page, "body", "backgroundColor") > 0.8
    assert this.page.evaluate("getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"
