"""The report as one HTML page: a single file that asks no network for anything and reads without JavaScript.

It draws what the journal holds and what the verdict says of it; it judges nothing itself.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup, escape

from gradctl._journal import Run
from gradctl._verdict import Verdict
from gradctl.report import _chart, _heat, _layers, _sections
from gradctl.report._axes import count_text, milliseconds_text
from gradctl.report._chart import shortened
from gradctl.report._series import Trace, time_split, trace

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Control characters and lone surrogates: HTML cannot hold them, UTF-8 cannot write them."""


def render(run: Run, verdict: Verdict) -> str:
    """Return the whole page as text that UTF-8 can write.

    Args:
        run: the journals of a run directory.
        verdict: what they say: the sentence, the findings, the figures and which optimizer the page is about.

    Source: layout and order after research on well-liked profilers; every chart is drawn by our own writer.
    """
    main = verdict.main
    chosen = verdict.stages or (() if verdict.main_optimizer is None else (verdict.main_optimizer,))
    seen = trace(main, chosen) if main is not None and chosen else None
    seen = seen if seen is not None and seen.last_step > 0 else None
    late = frozenset(
        int(finding.measured["rank"])
        for finding in verdict.findings
        if finding.slug == "late-rank" and finding.measured and "rank" in finding.measured
    )
    ranks = _sections.ranks(run, main, chosen, late)
    command, facts = _sections.meta(run, main, len(ranks))
    script = _resource("page.js")
    page = _environment().get_template("page.html.j2").render(
        command=command,
        facts=facts,
        verdict=verdict,
        chart=_draw(seen, verdict) if seen and main else None,
        run_note=_run_note(seen, verdict),
        ranks=ranks,
        others=_sections.others(run, main, chosen) if seen else (),
        main_label=_main_label(seen),
        split=time_split(seen.blocks) if seen else None,
        gpu=bool(main and main.run and main.run.device not in ("", "cpu")),
        saved=_sections.saved_table(main) if main else None,
        agreement=_sections.agreement(seen) if seen else None,
        layers=_layers.table(seen) if seen else None,
        layers_note=_layers_note(seen),
        footer=_sections.footer(run, main),
        css=Markup(_resource("page.css")),  # noqa: S704  our own file
        js=Markup(script),  # noqa: S704  our own file
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    return UNPRINTABLE.sub("\ufffd", page)


def _draw(seen: Trace, verdict: Verdict) -> _chart.Chart:
    heat = _heat.build(seen.names, seen.samples, seen.last_step)
    events = verdict.main.events if verdict.main else ()
    return _chart.draw(seen, events, bad_step=verdict.first_bad_step, heat=heat)


def _run_note(seen: Trace | None, verdict: Verdict) -> str:
    if seen is None:
        if verdict.main is None or verdict.main.run is None:
            return "The journal holds no record of a run. There is nothing to draw."
        return "No training step was seen, so there is nothing to draw here. What could not be seen is at the end of the page."
    parts: list[str] = []
    if seen.by_backward:
        parts.append("No optimizer was seen: each backward counts as a step.")
    if len(seen.optimizers) > 1:
        parts.append(f"{len(seen.optimizers)} optimizers step together and are drawn as one.")
    if len(seen.samples.first):
        parts.append("Everything shares one step axis. Each heat-map cell is the largest value in its block of steps, so a single spike cannot hide.")
    return " ".join(parts) or "Everything shares one step axis."


def _main_label(seen: Trace | None) -> str:
    if seen is None or not seen.optimizers:
        return "nothing"
    record = seen.optimizers[0]
    roots = ", ".join(shortened(name, 60) for name, _ in record.roots[:3])
    label = "the backwards" if seen.by_backward else shortened(record.cls or "an optimizer", 60)
    return f"{label} of {roots}" if roots else f"{label} with {count_text(len(seen.names))} tensors"


def _layers_note(seen: Trace | None) -> str:
    shown = _layers.table(seen) if seen else None
    if shown is None:
        return ""
    parts = ["Median over the sampled steps, curves on their own scale."]
    if shown.any_update:
        parts.append("An update moves a healthy matrix by 5e-5 to 1e-2 of its size, the green band. Vectors, grey, start near zero and may move more.")
    return " ".join([*parts, _layers.shape_note(shown)]).strip()


def prose(words: str) -> Markup:
    """Escape text and set what stands between backticks as code."""
    pieces = str(words).split("`")
    if len(pieces) % 2 == 0:
        return escape(words)
    return Markup().join(Markup("<code>{}</code>").format(piece) if k % 2 else escape(piece) for k, piece in enumerate(pieces))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=DictLoader({"page.html.j2": _resource("page.html.j2")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": milliseconds_text, "prose": prose, "shortened": shortened}
    return environment


@cache
def _resource(name: str) -> str:
    return files("gradctl.report").joinpath(name).read_text(encoding="utf-8")
