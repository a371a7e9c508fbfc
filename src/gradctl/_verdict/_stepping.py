"""Is the order of a step right: what is divided, scaled, clipped, stepped and zeroed, how often and after what.

Each rule looks at the groups of one optimizer (see `_groups`) and yields findings that point at the line to change and
say how it should be written. A false alarm is worse than a miss: a rule speaks of a habit, not of one odd group, and is
silent about what a library calls, what the program edits by hand, and what may be meant.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from gradctl._results import Finding, Severity, Span
from gradctl._verdict._facts import Facts
from gradctl._verdict._groups import STEADY, Group, Op, Order
from gradctl._verdict._training import Training, real, whole
from gradctl._verdict._words import count, number, percent

Places = tuple[tuple[int, str], ...]


def undivided_loss(facts: Facts, training: Training) -> Iterator[Finding]:
    """Each microbatch hands a mean to backward, and nothing divides it by their number."""
    order = training.order
    accumulation = order.accumulation
    if accumulation is None:
        return
    size, site = accumulation
    hits = _times(g for g in order.groups if _is_undivided(g))
    if hits < 2 or hits < STEADY * _times(g for g in order.groups if g.microbatches):
        return
    text = order.sites[site].text if site in order.sites else ""
    yield from _says(
        facts, order, "undivided-loss", site,
        f"{size} microbatches add up to one step, and the mean of each is not divided by {size}",
        f"The gradient of a step is {size} times that of one big batch: SGD steps {size} times as far, clipping and "
        "weight decay act at another strength, and Adam hides it.",
        _written("divide it", divided(text, size), "the loss of each by their number, or sum and divide by all rows"),
        also=((order.step_site, "step"),), measured={"microbatches": size},
    )  # fmt: skip


def _is_undivided(group: Group) -> bool:
    ops = group.microbatches
    return bool(ops) and not group.is_edited and all(op.has("m") and op.lacks("g") for _, op in ops)


def clip_before_unscale(facts: Facts, training: Training) -> Iterator[Finding]:
    """Gradients are clipped while they are still multiplied by the loss scale."""
    order = training.order
    found = [(group, clip) for group in order.groups for clip in _clips_scaled(group)]
    hits = _times(group for group, _ in found)
    if not _is_habit(hits, order):
        return
    group, clip = found[0]
    scaler, optimizer = _names(order, group)
    why = "The limit is meant for gradients as they are; here they are still multiplied by the loss scale."
    if group.norm and group.limit and group.scale and group.norm > group.limit > 0:
        true = group.norm / group.scale
        update = group.limit / group.norm / min(1.0, group.limit / true)
        why = (
            f"The norm it saw was {number(group.norm)}: {number(true)} times the loss scale of {number(group.scale)}. "
            f"It cut the update to {number(update)} of what it should be."
        )
    yield from _says(
        facts, order, "clip-before-unscale", clip.site,
        f"Gradients are clipped before they are unscaled, in {_of(hits, order)}", why,
        f"unscale on the line before:\n{scaler}.unscale_({optimizer})\n{_text(order, clip.site)}",
        also=((group.ops[group.scaler_step].site if group.scaler_step is not None else -1, "unscales"),),
        measured=_measured(norm=group.norm, limit=group.limit, scale=group.scale),
    )  # fmt: skip


def _clips_scaled(group: Group) -> Iterator[Op]:
    end = group.scaler_step
    backwards = [pair for pair in group.backwards if end is not None and pair[0] < end]
    if end is None or not backwards or not all(op.has("s") for _, op in backwards):
        return
    for index, op in group.own("C", backwards[0][0], end):
        if op.lacks("ib0ne") and not any(group.own("u", 0, index)):
            yield op
            return


def clip_per_microbatch(facts: Facts, training: Training) -> Iterator[Finding]:
    """What has been accumulated so far is clipped again after each microbatch."""
    order = training.order
    found = [(group, sites) for group in order.groups if (sites := _clips_each(group))]
    hits = _times(group for group, _ in found)
    if hits < 2 or hits < STEADY * _times(g for g in order.groups if g.microbatches):
        return
    group, (site, times) = max(found, key=lambda pair: pair[0].count)
    step = _text(order, order.step_site) or "optimizer.step()"
    yield from _says(
        facts, order, "clip-per-microbatch", site,
        f"The accumulated gradient is clipped {times} times before each step, after every microbatch",
        "Each time what has been summed so far is cut to the limit, so that early microbatches count less than late "
        "ones and the step is not that of the whole batch.",
        f"clip once, just before the step:\n{_text(order, site)}\n{step}",
        also=((group.microbatches[0][1].site, "backward"), (order.step_site, "step")), measured={"clips": times},
    )  # fmt: skip


def _clips_each(group: Group) -> tuple[int, int] | None:
    ops = group.microbatches
    if not ops:
        return None
    ends = [index for index, _ in ops[1:]] + [group.last_step]
    clips = [
        [op for _, op in group.own("C", index, end) if op.lacks("i0n")]
        for (index, _), end in zip(ops, ends, strict=True)
    ]
    between = [found[0] for found in clips[:-1] if len(found) == 1]
    if len(between) < len(ops) - 1 or len({(op.site, op.which) for op in between}) != 1:
        return None
    return between[0].site, sum(len(found) for found in clips)


def microbatches_dropped(facts: Facts, training: Training) -> Iterator[Finding]:
    """Gradients of whole microbatches that no step ever took."""
    order = training.order
    at_end, cleared = order.left()
    end = facts.end
    if facts.failure is not None or (end is not None and end.code not in (0, None)):
        at_end = 0  # a run that was cut short has dropped nothing on purpose
    if order.accumulation is None or not at_end + cleared:
        return
    size, site = order.accumulation
    where = " and ".join(
        words for words, n in ((f"{cleared} zeroed before a step", cleared), (f"{at_end} left at the end", at_end)) if n
    )
    step = _text(order, order.step_site) or "optimizer.step()"
    yield from _says(
        facts, order, "microbatches-dropped", site,
        f"{count(at_end + cleared, 'microbatch', 'microbatches')} never reached a step: {where}",
        f"A step follows every {size} microbatches, and the number of batches is no multiple of {size}: the gradients "
        "of the rest are computed and thrown away.",
        f"step for the rest too, after the loop (divide by their number, not by {size}; gradctl.Step flushes):\n{step}",
        also=((order.step_site, "step"),), measured={"dropped": at_end + cleared, "microbatches": size},
    )  # fmt: skip


def backward_in_autocast(facts: Facts, training: Training) -> Iterator[Finding]:
    """Backward is called inside of autocast: PyTorch advises against it, and mostly nothing changes."""
    order = training.order
    found = [(g, op) for g in order.groups for _, op in g.backwards[:1] if op.has("a") and op.lacks("l")]
    hits = _times(group for group, _ in found)
    if not _is_habit(hits, order):
        return
    site = found[0][1].site
    yield from _says(
        facts, order, "backward-in-autocast", site, "backward() is called inside of autocast",
        "Backward runs each operation in the type that its forward had, so this changes mostly nothing; code that runs "
        "in backward (custom functions, recomputation, hooks) is cast as well.",
        f"leave autocast first: indent this line as far as the `with`\n{_text(order, site)}",
        severity="note",
    )  # fmt: skip


def scheduler_per_microbatch(facts: Facts, training: Training) -> Iterator[Finding]:
    """The scheduler moves on after each microbatch, not after each step."""
    order = training.order
    found = [(group, times) for group in order.groups if (times := _schedules_each(group))]
    hits = _times(group for group, _ in found)
    if hits < 2 or hits < STEADY * _times(g for g in order.groups if g.microbatches):
        return
    site, times = max(found, key=lambda pair: pair[0].count)[1]
    step = _text(order, order.step_site) or "optimizer.step()"
    yield from _says(
        facts, order, "scheduler-per-microbatch", site,
        f"The scheduler steps {times} times for each step of its optimizer, once a microbatch",
        f"It counts optimizer steps: warm-up and decay are over {times} times too early.",
        f"move it beside the step:\n{step}\n{_text(order, site)}",
        also=((order.step_site, "step"),), measured={"scheduler_steps": times},
    )  # fmt: skip


def _schedules_each(group: Group) -> tuple[int, int] | None:
    ops = group.microbatches
    if not ops:
        return None
    others = any(op.kind == "S" and not op.has("o") for op in group.ops[: group.last_step])
    moves = [op for _, op in group.own("L") if op.lacks("pl")]
    for site, which in dict.fromkeys((op.site, op.which) for op in moves):
        times = sum(op.site == site and op.which == which for op in moves)
        between = [
            any(op.site == site and op.which == which for _, op in group.own("L", begin, end))
            for (begin, _), (end, _) in pairwise(ops)
        ]
        if times >= 2 and all(between) and not others:
            return site, times
    return None


def scheduler_after_skip(facts: Facts, training: Training) -> Iterator[Finding]:
    """The scaler skipped the step, and the scheduler moved on all the same."""
    order = training.order
    after_step = [(g, _moved_first(g)) for g in order.groups if g.after == "step"]
    each_step = sum(group.count for group, moved in after_step if moved is not None)
    total = sum(group.count for group, _ in after_step)
    skips = [(g, moved) for g in order.groups if g.after == "skip" and (moved := _moved_first(g)) is not None]
    hits = _times(group for group, _ in skips)
    if not hits or total < 2 or each_step < STEADY * total:
        return  # a scheduler that moves once an epoch may meet a skipped step
    site = skips[0][1]
    assert site is not None
    scaler, optimizer = _names(order, skips[0][0])
    text = _text(order, site)
    yield from _says(
        facts, order, "scheduler-after-skip", site,
        f"The scheduler moved on after {count(hits, 'step')} that the loss scaler had skipped",
        f"Skipped in all: {training.skipped}. Each moves the "
        "schedule ahead of the optimizer, most at the start, where the scale is looked for and warm-up matters.",
        f"move it only when the scale did not fall:\nscale = {scaler}.get_scale()\n{scaler}.step({optimizer})\n"
        f"{scaler}.update()\nif {scaler}.get_scale() >= scale:\n    {text}",
        measured={"times": hits},
    )  # fmt: skip


def _moved_first(group: Group) -> int | None:
    """Return where this optimizer's scheduler moved before the first backward of a group; None if it did not."""
    first = next((i for i, op in enumerate(group.ops) if op.kind == "B"), len(group.ops))
    return next((op.site for _, op in group.own("L", 0, first) if op.lacks("pl")), None)


def step_past_scaler(facts: Facts, training: Training) -> Iterator[Finding]:
    """The optimizer itself is stepped with gradients that are still multiplied by the loss scale."""
    order = training.order
    found = [group for group in order.groups if _is_past_scaler(group)]
    if not found:
        return
    scale = next((group.scale for group in found if group.scale), None)
    step = found[0].step
    assert step is not None
    factor = f"{number(scale)} times" if scale else "the loss scale, 65536 by default, times"
    yield from _says(
        facts, order, "step-past-scaler", step.site,
        f"The optimizer steps past the loss scaler, in {_of(_times(found), order)}",
        f"Nothing has unscaled the gradients: the update is {factor} what it should be, and inf is not skipped. "
        "Adam hides the factor.",
        _written("let the scaler step", stepped(_text(order, step.site))),
        also=((found[0].backwards[-1][1].site, "scaled"),), measured=_measured(scale=scale),
    )  # fmt: skip


def _is_past_scaler(group: Group) -> bool:
    step = group.step
    return (
        step is not None
        and step.lacks("vl")
        and not group.is_edited
        and bool(group.backwards)
        and all(op.has("s") for _, op in group.backwards)
        and group.scaler_step is None
        and not any(group.own("u"))
    )


def unscaled_backward(facts: Facts, training: Training) -> Iterator[Finding]:
    """The scaler unscales gradients that it has never scaled."""
    order = training.order
    found = [group for group in order.groups if _is_unscaled(group)]
    if not found:
        return
    site = found[0].backwards[-1][1].site
    scaler, _ = _names(order, found[0])
    assert found[0].scaler_step is not None
    yield from _says(
        facts, order, "unscaled-backward-scaler-step", site,
        f"The scaler steps after a backward that it has not scaled, in {_of(_times(found), order)}",
        "It divides the gradients by the loss scale, 65536 by default, so that the update is 1.5e-5 of what it should "
        "be. Adam hides the factor.",
        _written("scale the loss", scaled(_text(order, site), scaler), f"{scaler}.scale(loss).backward()"),
        also=((found[0].ops[found[0].scaler_step].site, "unscales"),),
    )  # fmt: skip


def _is_unscaled(group: Group) -> bool:
    end = group.scaler_step
    if end is None or group.is_edited:
        return False
    found = [op for index, op in group.backwards if index < end]
    scales = any(op.kind == "x" for op in group.ops[:end])
    return bool(found) and all(op.lacks("sdgl") and (op.lacks("z") or not scales) for op in found)


def unscale_twice(facts: Facts, training: Training) -> Iterator[Finding]:
    """Gradients of one step are unscaled a second time; PyTorch raises."""
    order = training.order
    told = order.told("unscale_twice")
    if not told or (told[0].o is None and training is not facts.training):
        return
    site, first = whole(told[0].data.get("s"), -1), whole(told[0].data.get("first"), -1)
    again = site == first
    yield from _says(
        facts, order, "unscale-twice", site,
        "Gradients are unscaled a second time before update()",
        "unscale_ divides by the loss scale, once a step: "
        + ("here it runs for every microbatch." if again else "another line has done it already."),
        f"unscale once, after the last microbatch:\n{_text(order, site)}"
        if again else f"take one of the two away:\n{_text(order, site)}",
        also=((-1 if again else first, "first"),),
    )  # fmt: skip


def unscale_between_microbatches(facts: Facts, training: Training) -> Iterator[Finding]:
    """Gradients of one step that are multiplied by different scales: unscaled, or the scale changed, between them."""
    order = training.order
    found = [(group, op) for group in order.groups if (op := _scale_changes_inside(group)) is not None]
    if not found:
        return
    group, op = found[0]
    unscales = op.kind == "u"
    what = "Gradients are unscaled" if unscales else "The loss scale is changed"
    yield from _says(
        facts, order, "unscale-between-microbatches", op.site,
        f"{what} between the microbatches of one step, in {_of(_times(g for g, _ in found), order)}",
        "What was accumulated before and what comes after it are multiplied by different scales, and are added. "
        "Measured with four microbatches: an update of 4.5 times the right one, 0.75 of it where the scale halved.",
        f"{'unscale' if unscales else 'update the scale'} after the last microbatch only, in the `if` of the step:\n"
        + _text(order, op.site),
        also=((group.backwards[-1][1].site, "backward"), (order.step_site, "step")),
    )  # fmt: skip


def _scale_changes_inside(group: Group) -> Op | None:
    ops = [pair for pair in group.backwards if pair[1].has("s")]
    for (begin, _), (end, _) in pairwise(ops):
        for _, op in group.own("u", begin, end):
            return op
        for index in range(begin, end):
            op = group.ops[index]
            if op.kind == "d" and op.has("c"):
                return op
    return None


def fp16_norm_overflow(facts: Facts, training: Training) -> Iterator[Finding]:
    """A norm of float16 gradients is inf although every gradient is finite: clipping multiplies them by 0."""
    order = training.order
    told = training.journal.named("norm_overflow")
    if not told or training is not _first(facts, training):
        return
    norm = real(told[0].data.get("norm"))
    site = whole(told[0].data.get("s"), -1)
    size = "" if norm is None else f" It is {number(norm)} in float32."
    yield from _says(
        facts, order, "fp16-norm-overflow", site,
        f"The norm to clip by overflowed in float16, {count(len(told), 'time')}, while every gradient was finite",
        f"float16 ends at 65504.{size} Clipping divides by the norm, so that all gradients became 0 in that step.",
        'keep float32 weights (gradctl.precision("fp16-scaled")), or clip float32 copies of the gradients',
        measured=_measured(norm=norm, times=len(told)),
    )  # fmt: skip


def clip_nothing(facts: Facts, training: Training) -> Iterator[Finding]:
    """Clipping was given no parameters at all."""
    order = training.order
    if training is not _first(facts, training):
        return
    found = [(g, op) for g in order.groups for op in g.ops if op.kind == "C" and op.has("0") and g.backwards]
    hits = _times(group for group, _ in found)
    if hits < 2 or hits < 0.5 * order.watched:
        return
    site = found[0][1].site
    yield from _says(
        facts, order, "clip-nothing", site,
        f"Clipping was given no parameters, in {_of(hits, order)}",
        "A generator such as model.parameters() is empty once it has been gone through: the norm is 0 and nothing is "
        "clipped.",
        "hand in a fresh one, or a list:\ntorch.nn.utils.clip_grad_norm_(model.parameters(), ...)",
    )  # fmt: skip


RULES: tuple[Callable[[Facts, Training], Iterator[Finding]], ...] = (
    step_past_scaler,
    unscaled_backward,
    unscale_twice,
    unscale_between_microbatches,
    clip_before_unscale,
    undivided_loss,
    clip_per_microbatch,
    scheduler_per_microbatch,
    microbatches_dropped,
    scheduler_after_skip,
    fp16_norm_overflow,
    clip_nothing,
    backward_in_autocast,
)
SLUGS = (
    "undivided-loss", "clip-before-unscale", "clip-per-microbatch", "microbatches-dropped", "backward-in-autocast",
    "scheduler-per-microbatch", "scheduler-after-skip", "step-past-scaler", "unscaled-backward-scaler-step",
    "unscale-twice", "unscale-between-microbatches", "fp16-norm-overflow", "clip-nothing", "bf16-stall",
)  # fmt: skip
"""What these rules say, and `bf16-stall` of `_health`; documented in `docs/stepping.md`."""


def step_line(facts: Facts, training: Training) -> Span | None:
    """Return where the program steps this optimizer, if that was seen."""
    order = training.order
    return _span(facts, order, order.step_site)


# -- the line as it should be written ---------------------------------------------------------------------------------


def divided(text: str, size: int) -> str:
    """Return a line that calls backward, with its loss divided by `size`; empty if the line cannot be read."""
    scaled_loss = re.fullmatch(r"(.*\.scale\()(.+)(\)\.backward\(.*)", text)
    if scaled_loss is not None:
        return f"{scaled_loss[1]}{_factor(scaled_loss[2], size)}{scaled_loss[3]}"
    loss, rest = _backward(text)
    return f"({_factor(loss, size)}).backward({rest}" if loss else ""


def scaled(text: str, scaler: str) -> str:
    """Return a line that calls backward, with its loss scaled; empty if the line cannot be read."""
    loss, rest = _backward(text)
    return f"{scaler}.scale({loss}).backward({rest}" if loss else ""


def stepped(text: str) -> str:
    """Return a line that steps an optimizer, through the scaler."""
    plain = re.fullmatch(r"([\w.\[\]]+)\.step\(\)(.*)", text)
    return f"scaler.step({plain[1]}){plain[2]}" if plain is not None else "scaler.step(optimizer)"


def _backward(text: str) -> tuple[str, str]:
    """Return the loss of a line that calls backward, and what follows the bracket; empty if it is no whole one."""
    plain = re.fullmatch(r"([^=]+?)\.backward\((.*)", text)
    return (plain[1], plain[2]) if plain is not None and text.count("(") == text.count(")") else ("", "")


def _factor(expression: str, size: int) -> str:
    try:
        tree = ast.parse(expression, mode="eval").body
        # what stands in brackets already begins after the first of them
        simple = isinstance(tree, ast.Name | ast.Attribute | ast.Call | ast.Subscript) or tree.col_offset > 0
        simple = simple and (tree.col_offset == 0 or tree.end_col_offset == len(expression) - tree.col_offset)
    except (SyntaxError, ValueError):
        simple = False
    return f"{expression} / {size}" if simple else f"({expression}) / {size}"


def _written(words: str, line: str, otherwise: str = "") -> str:
    return f"{words}:\n{line}" if line else f"{words}: {otherwise}"


def _names(order: Order, group: Group) -> tuple[str, str]:
    """Return what the source calls the scaler and the optimizer."""
    sites = [op.site for g in (group, *order.groups) for op in g.ops if op.kind == "t" and op.has("o")]
    for site in sites:
        found = re.search(r"([\w.]+)\.step\(([\w.\[\]]+)", _text(order, site))
        if found is not None:
            return found[1], found[2]
    return "scaler", "optimizer"


# -- small things -----------------------------------------------------------------------------------------------------


def _times(groups: Iterable[Group]) -> int:
    return sum({id(group): group.count for group in groups}.values())


def _is_habit(hits: int, order: Order) -> bool:
    return hits > 0 and (hits >= 2 or hits == order.watched)


def _of(hits: int, order: Order) -> str:
    if hits >= order.watched:
        return "every step that was watched" if hits > 1 else "the one step that was watched"
    return f"{hits} of {order.watched} steps that were watched ({percent(hits / order.watched)})"


def _text(order: Order, site: int) -> str:
    return order.sites[site].text if site in order.sites else ""


def _span(facts: Facts, order: Order, site: int, role: str = "") -> Span | None:
    place = order.sites.get(site)
    found = None if place is None else facts.span({"file": place.file, "line": place.line}, order.journal)
    return None if found is None else Span(found.file, found.line, role)


def _measured(**numbers: float | None) -> dict[str, float] | None:
    return {name: value for name, value in numbers.items() if value is not None} or None


def _first(facts: Facts, training: Training) -> Training:
    return next(found[0] for journal, found in facts.by_rank if journal is training.journal)


def _says(
    facts: Facts,
    order: Order,
    slug: str,
    site: int,
    symptom: str,
    why: str,
    fix: str,
    *,
    severity: Severity = "warning",
    also: Places = (),
    measured: dict[str, float] | None = None,
) -> Iterator[Finding]:
    """Yield a finding, if its place is known: without a line it would be no help."""
    primary = _span(facts, order, site)
    if primary is None:
        return
    spans = (_span(facts, order, other, role) for other, role in also if other != site)
    evidence = tuple(span for span in spans if span is not None)
    fix = fix.rstrip("\n")
    yield Finding(slug, severity, symptom, why, fix, 1.0, primary, evidence, (), measured)
