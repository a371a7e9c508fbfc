"""Is the order of a step right: what is divided, scaled, clipped, stepped and zeroed, how often and after what.

Each rule looks at the groups of one optimizer (see `_groups`) and yields findings that point at the line to change and
say how it should be written. A false alarm is worse than a miss: a rule speaks of a habit, not of one odd group, and is
silent about what a library calls, what the program edits by hand, and what may be meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from gradctl._results import Finding
from gradctl._verdict._facts import Facts
from gradctl._verdict._groups import STEADY, Group, Op
from gradctl._verdict._lines import (
    as_written,
    divided,
    first_of,
    is_habit,
    names_of,
    numbers_of,
    says,
    scaled,
    share_of,
    stepped,
    text_of,
    total_of,
)
from gradctl._verdict._training import Training, real, whole
from gradctl._verdict._words import count, number


def undivided_loss(facts: Facts, training: Training) -> Iterator[Finding]:
    """Each microbatch hands a mean to backward, and nothing divides it by their number."""
    order = training.order
    accumulation = order.accumulation
    if accumulation is None:
        return
    size, site = accumulation
    hits = total_of(g for g in order.groups if _is_undivided(g))
    if hits < 2 or hits < STEADY * total_of(g for g in order.groups if g.microbatches):
        return
    text = order.sites[site].text if site in order.sites else ""
    yield from says(
        facts, order, "undivided-loss", site,
        f"{size} microbatches add up to one step, and the mean of each is not divided by {size}",
        f"The gradient of a step is {size} times that of one big batch: SGD steps {size} times as far, clipping and "
        "weight decay act at another strength, and Adam hides it.",
        as_written("divide it", divided(text, size), "the loss of each by their number, or sum and divide by all rows"),
        also=((order.step_site, "step"),), measured={"microbatches": size},
    )  # fmt: skip


def _is_undivided(group: Group) -> bool:
    ops = group.microbatches
    return bool(ops) and not group.is_edited and all(op.has("m") and op.lacks("g") for _, op in ops)


def clip_before_unscale(facts: Facts, training: Training) -> Iterator[Finding]:
    """Gradients are clipped while they are still multiplied by the loss scale."""
    order = training.order
    found = [(group, clip) for group in order.groups for clip in _clips_scaled(group)]
    hits = total_of(group for group, _ in found)
    if not is_habit(hits, order):
        return
    group, clip = found[0]
    scaler, optimizer = names_of(order, group)
    why = "The limit is meant for gradients as they are; here they are still multiplied by the loss scale."
    if group.norm and group.limit and group.scale and group.norm > group.limit > 0:
        true = group.norm / group.scale
        update = group.limit / group.norm / min(1.0, group.limit / true)
        why = (
            f"The norm it saw was {number(group.norm)}: {number(true)} times the loss scale of {number(group.scale)}. "
            f"It cut the update to {number(update)} of what it should be."
        )
    yield from says(
        facts, order, "clip-before-unscale", clip.site,
        f"Gradients are clipped before they are unscaled, in {share_of(hits, order)}", why,
        f"unscale on the line before:\n{scaler}.unscale_({optimizer})\n{text_of(order, clip.site)}",
        also=((group.ops[group.scaler_step].site if group.scaler_step is not None else -1, "unscales"),),
        measured=numbers_of(norm=group.norm, limit=group.limit, scale=group.scale),
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
    hits = total_of(group for group, _ in found)
    if hits < 2 or hits < STEADY * total_of(g for g in order.groups if g.microbatches):
        return
    group, (site, times) = max(found, key=lambda pair: pair[0].count)
    step = text_of(order, order.step_site) or "optimizer.step()"
    yield from says(
        facts, order, "clip-per-microbatch", site,
        f"The accumulated gradient is clipped {times} times before each step, after every microbatch",
        "Each time what has been summed so far is cut to the limit, so that early microbatches count less than late "
        "ones and the step is not that of the whole batch.",
        f"clip once, just before the step:\n{text_of(order, site)}\n{step}",
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
    step = text_of(order, order.step_site) or "optimizer.step()"
    yield from says(
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
    hits = total_of(group for group, _ in found)
    if not is_habit(hits, order):
        return
    site = found[0][1].site
    yield from says(
        facts, order, "backward-in-autocast", site, "backward() is called inside of autocast",
        "Backward runs each operation in the type that its forward had, so this changes mostly nothing; code that runs "
        "in backward (custom functions, recomputation, hooks) is cast as well.",
        f"leave autocast first: indent this line as far as the `with`\n{text_of(order, site)}",
        severity="note",
    )  # fmt: skip


def scheduler_per_microbatch(facts: Facts, training: Training) -> Iterator[Finding]:
    """The scheduler moves on after each microbatch, not after each step."""
    order = training.order
    found = [(group, times) for group in order.groups if (times := _schedules_each(group))]
    hits = total_of(group for group, _ in found)
    if hits < 2 or hits < STEADY * total_of(g for g in order.groups if g.microbatches):
        return
    site, times = max(found, key=lambda pair: pair[0].count)[1]
    step = text_of(order, order.step_site) or "optimizer.step()"
    yield from says(
        facts, order, "scheduler-per-microbatch", site,
        f"The scheduler steps {times} times for each step of its optimizer, once a microbatch",
        f"It counts optimizer steps: warm-up and decay are over {times} times too early.",
        f"move it beside the step:\n{step}\n{text_of(order, site)}",
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
    hits = total_of(group for group, _ in skips)
    if not hits or total < 2 or each_step < STEADY * total:
        return  # a scheduler that moves once an epoch may meet a skipped step
    site = skips[0][1]
    assert site is not None
    scaler, optimizer = names_of(order, skips[0][0])
    text = text_of(order, site)
    yield from says(
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
    yield from says(
        facts, order, "step-past-scaler", step.site,
        f"The optimizer steps past the loss scaler, in {share_of(total_of(found), order)}",
        f"Nothing has unscaled the gradients: the update is {factor} what it should be, and inf is not skipped. "
        "Adam hides the factor.",
        as_written("let the scaler step", stepped(text_of(order, step.site))),
        also=((found[0].backwards[-1][1].site, "scaled"),), measured=numbers_of(scale=scale),
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
    scaler, _ = names_of(order, found[0])
    assert found[0].scaler_step is not None
    yield from says(
        facts, order, "unscaled-backward-scaler-step", site,
        f"The scaler steps after a backward that it has not scaled, in {share_of(total_of(found), order)}",
        "It divides the gradients by the loss scale, 65536 by default, so that the update is 1.5e-5 of what it should "
        "be. Adam hides the factor.",
        as_written("scale the loss", scaled(text_of(order, site), scaler), f"{scaler}.scale(loss).backward()"),
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
    yield from says(
        facts, order, "unscale-twice", site,
        "Gradients are unscaled a second time before update()",
        "unscale_ divides by the loss scale, once a step: "
        + ("here it runs for every microbatch." if again else "another line has done it already."),
        f"unscale once, after the last microbatch:\n{text_of(order, site)}"
        if again else f"take one of the two away:\n{text_of(order, site)}",
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
    yield from says(
        facts, order, "unscale-between-microbatches", op.site,
        f"{what} between the microbatches of one step, in {share_of(total_of(g for g, _ in found), order)}",
        "What was accumulated before and what comes after it are multiplied by different scales, and are added. "
        "Measured with four microbatches: an update of 4.5 times the right one, 0.75 of it where the scale halved.",
        f"{'unscale' if unscales else 'update the scale'} after the last microbatch only, in the `if` of the step:\n"
        + text_of(order, op.site),
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
    if not told or training is not first_of(facts, training):
        return
    norm = real(told[0].data.get("norm"))
    site = whole(told[0].data.get("s"), -1)
    size = "" if norm is None else f" It is {number(norm)} in float32."
    yield from says(
        facts, order, "fp16-norm-overflow", site,
        f"The norm to clip by overflowed in float16, {count(len(told), 'time')}, while every gradient was finite",
        f"float16 ends at 65504.{size} Clipping divides by the norm, so that all gradients became 0 in that step.",
        'keep float32 weights (gradctl.precision("fp16-scaled")), or clip float32 copies of the gradients',
        measured=numbers_of(norm=norm, times=len(told)),
    )  # fmt: skip


def clip_nothing(facts: Facts, training: Training) -> Iterator[Finding]:
    """Clipping was given no parameters at all."""
    order = training.order
    if training is not first_of(facts, training):
        return
    found = [(g, op) for g in order.groups for op in g.ops if op.kind == "C" and op.has("0") and g.backwards]
    hits = total_of(group for group, _ in found)
    if hits < 2 or hits < 0.5 * order.watched:
        return
    site = found[0][1].site
    yield from says(
        facts, order, "clip-nothing", site,
        f"Clipping was given no parameters, in {share_of(hits, order)}",
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
