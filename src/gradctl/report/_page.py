"""The report as one HTML page: a single file that asks no network for anything and reads without JavaScript.

It draws what the journal holds and what the verdict says of it; it judges nothing itself.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup, escape

from gradctl._journal import Run
from gradctl._verdict import Facts, Verdict, lateness
from gradctl.report import _chart, _heat, _layers, _memory, _processes, _sections
from gradctl.report._axes import count_text, milliseconds_text
from gradctl.report._lanes import Bad
from gradctl.report._series import Trace, time_split, trace
from gradctl.report._svg import shortened

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters, overrides of the reading direction, and surrogates: no name needs them, UTF-8 lacks the last."""


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
    whole = Facts(run)
    late = lateness(whole)
    ranks = _processes.ranks(whole.ranks, chosen, late.rank if late else None)
    layers = _layers.table(seen) if seen else None
    command, facts = _sections.meta(run, main, len(ranks))
    script = _resource("page.js")
    page = _environment().get_template("page.html.j2").render(
        command=command,
        facts=facts,
        verdict=verdict,
        chart=_draw(seen, verdict, whole) if seen and main else None,
        run_note=_run_note(seen, verdict),
        ranks=ranks,
        others=_processes.others(run, main, chosen, whole.ranks) if seen else (),
        main_label=_main_label(seen),
        split=time_split(seen.blocks) if seen else None,
        gpu=bool(main and main.run and main.run.device not in ("", "cpu")),
        saved=_sections.saved_table(main) if main else None,
        memory=_memory.section(main) if main else None,
        agreement=_sections.agreement(seen) if seen else None,
        layers=layers,
        layers_note=_layers_note(layers) if layers else "",
        footer=_sections.footer(run, main),
        css=Markup(_resource("page.css")),
        js=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    return UNPRINTABLE.sub("\ufffd", page)


def _draw(seen: Trace, verdict: Verdict, whole: Facts) -> _chart.Chart:
    heat = _heat.build(seen.names, seen.samples, seen.last_step)
    bad: Bad | None = None
    if verdict.first_bad_step:
        found = whole.training.nonfinite if whole.training else None
        bad = Bad(verdict.first_bad_step, found.steps if found else 1, lasting=bool(found and found.lasting))
    return _chart.draw(seen, verdict.main.events if verdict.main else (), bad=bad, heat=heat)


def _run_note(seen: Trace | None, verdict: Verdict) -> str:
    if seen is None:
        if verdict.main is None or verdict.main.run is None:
            return "The journal holds no record of a run. There is nothing to draw."
        return "No training step was seen: there is nothing to draw. What could not be seen is at the end of the page."
    parts: list[str] = []
    if seen.by_backward:
        parts.append("No optimizer was seen: each backward counts as a step.")
    if len(seen.optimizers) > 1:
        parts.append(f"{len(seen.optimizers)} optimizers step together and are drawn as one.")
    if len(seen.samples.first):
        parts.append(
            "Everything shares one step axis. Each heat-map cell is the largest value in its block of steps, so a"
            " single spike cannot hide."
        )
    return " ".join(parts) or "Everything shares one step axis."


def _main_label(seen: Trace | None) -> str:
    if seen is None or not seen.optimizers:
        return "nothing"
    record = seen.optimizers[0]
    roots = ", ".join(shortened(name, 60) for name, _ in record.roots[:3])
    label = "the backwards" if seen.by_backward else shortened(record.cls or "an optimizer", 60)
    return f"{label} of {roots}" if roots else f"{label} with {count_text(len(seen.names))} tensors"


def _layers_note(layers: _layers.LayerTable) -> str:
    parts = ["Median over the sampled steps, curves on their own scale."]
    if layers.any_update:
        parts.append(
            "An update moves a healthy matrix by 5e-5 to 1e-2 of its size, the green band. Vectors, grey, start near"
            " zero and may move more."
        )
    return " ".join([*parts, _layers.left_out_note(layers)]).strip()


def prose(words: str, names: Sequence[str] = ()) -> Markup:
    """Escape text, and set as code the `names` in it and what stands between backticks."""
    known = sorted({name for name in names[:50] if len(name) > 1}, key=len, reverse=True)
    pattern = "|".join([r"`([^`]+)`", *(rf"(?<![\w.]){re.escape(name)}(?![\w])" for name in known)])
    parts: list[Markup] = []
    end = 0
    for found in re.finditer(pattern, words):
        parts += [escape(words[end : found.start()]), Markup("<code>{}</code>").format(found[1] or found[0])]
        end = found.end()
    return Markup().join([*parts, escape(words[end:])])


def _minus(words: str) -> str:
    return re.sub(r"(?<!\w)-(?=\d)", "−", words)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=DictLoader({"page.html.j2": _resource("page.html.j2")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = environment.filters  # typed after the built-in ones
    filters |= {"minus": _minus, "ms": milliseconds_text, "prose": prose, "shortened": shortened}
    return environment


@cache
def _resource(name: str) -> str:
    return files("gradctl.report").joinpath(name).read_text(encoding="utf-8")
