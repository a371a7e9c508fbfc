"""A NaN or an infinity: the operation that first made it, from what, and whether it was masked too late."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from gradctl._explain._context import Candidate, Context, count
from gradctl._explain.rules import Rule
from gradctl._explain.rules.numbers import names
from gradctl._lineage import VIEWS, Flag, Hit, Node, NonfiniteFacts, Site, site, upstream

_AFTER = 14
_SKIPS = 12
_PERSISTS = 3
_BY_SCALE = ("exploded_grad", "nan_overflow", "nonfinite")


class _Cause(NamedTuple):
    slug: str
    place: Site | None
    why: str
    node: Node | None
    confidence: float
    fix: str = ""


def nonfinite(context: Context) -> Iterable[Candidate]:
    """The first NaN or infinity that reached a gradient, or the loss."""
    found = _worst(context)
    if found is None:
        return
    cause = _in_the_forward(context, found) if _loss_is_broken(found) else _in_the_backward(context, found)
    if cause is None:
        return
    certain = _certainty(context, found, cause)
    skipped = not found.steps and context.error is None and bool(context.facts.optimizers and context.facts.steps)
    loss = "the loss is not finite" if _loss_is_broken(found) else "the loss is finite, and"
    number = count(len(found.leaves), "parameter")
    gradients = f"{number} {'gets' if len(found.leaves) == 1 else 'get'} a gradient of NaN or infinity"
    yield Candidate(
        cause.slug,
        cause.place,
        f"{'from' if found.steps + found.backwards else 'at'} step {found.step + 1}"
        f"{' on' if found.steps + found.backwards else ''}"
        f"{', skipped by the program' if skipped else ''}: {loss}{'; ' if _loss_is_broken(found) else ' '}{gradients}",
        cause.why,
        cause.fix,
        confidence=min(cause.confidence, certain),
        severity="warning" if skipped else "error",
        evidence=_evidence(found, cause),
        parameters=found.leaves or tuple(found.backward.leaves),
        node=cause.node,
        root=found.backward.roots[0] if found.backward.roots else None,
        explains="nonfinite",
    )


def _certainty(context: Context, found: NonfiniteFacts, cause: _Cause) -> float:
    """Return how sure it is that this is not a loss scaler at work, or a step that the program leaves out itself."""
    if not found.leaves and found.steps:
        return 0.85 if found.backwards >= _SKIPS else 0.7
    if found.steps or not context.facts.optimizers:
        return 1.0
    if context.error is None and found.run > _SKIPS:
        return 0.9
    if context.error is None and found.first and cause.slug in _BY_SCALE and _is_scaled(found):
        return 0.3  # a scale that begins too high costs some steps
    if context.error is not None or not context.facts.steps:
        return 0.85 if found.backwards >= 2 else 0.6
    return 0.8 if found.run >= _PERSISTS and context.finished and _goes_on(context, found) else 0.3


def _worst(context: Context) -> NonfiniteFacts | None:
    """Return the break that steps used, or else the one that has gone on longest."""
    found = context.facts.nonfinite
    if found is not None and (found.steps or context.error is not None):
        return found
    left = [one for one in (found, *context.facts.withheld.values()) if one is not None]
    return max(left, key=lambda one: one.run, default=None)


def _goes_on(context: Context, found: NonfiniteFacts) -> bool:
    """Whether the loss was broken to the end, and not just until the program went on without it."""
    apart = (found.last - found.generation) / max(found.run - 1, 1)
    return context.facts.generation - 1 - found.last <= 2 * apart


def _is_scaled(found: NonfiniteFacts) -> bool:
    """Whether the loss was multiplied with a plain number at last, as loss scalers do."""
    root = next(iter(found.backward.roots), None)
    if root is None or names.operation(root) not in ("mul", "__mul__", "__rmul__", "__imul__", "multiply"):
        return False
    return sum(parent.trainable for parent in root.inputs) == 1


def _loss_is_broken(found: NonfiniteFacts) -> bool:
    return any(size - size != 0.0 for size in found.backward.root_sizes)


def _evidence(found: NonfiniteFacts, cause: _Cause) -> tuple[tuple[Site | None, str], ...]:
    stack = found.backward.stack
    more: list[tuple[Site | None, str]] = [(site(stack[0]), "backward")] if stack else []
    if found.hit is not None and found.hit.node is not None and found.hit.node.site != cause.place:
        more.insert(0, (found.hit.node.site, "where the gradient broke"))
    return tuple(more)


# ---------------------------------------------------------------------------------------------- forward


class _Flags:
    """The flagged values of one generation, and how they hang together.

    Args:
        flags: in the order of making.
    """

    def __init__(self, flags: list[Flag]) -> None:
        self.by = {id(flag.node): flag for flag in flags}

    def sources(self, node: Node) -> list[Flag]:
        """Return the flagged inputs of an operation, those behind views included."""
        found: list[Flag] = []
        queue = list(node.inputs)
        seen: set[int] = set()
        while queue:
            at = queue.pop()
            if id(at) in seen:
                continue
            seen.add(id(at))
            if id(at) in self.by:
                found.append(self.by[id(at)])
            elif at.op in VIEWS:
                queue += at.inputs
        return found

    def meant(self, flag: Flag) -> bool:
        """Whether these infinities are a mask: put in place, or handed on from one."""
        if flag.nan or flag.high:
            return False
        if names.operation(flag.node) in names.MASKING:
            return True
        sources = self.sources(flag.node)
        if sources:
            return all(self.meant(source) for source in sources)
        return any(operand.get("low") for operand in flag.operands) and any(
            not _seen_through(parent).trainable for parent in flag.node.inputs
        )

    def origin(self, flag: Flag) -> Flag:
        """Return the first flag behind this one that is not a mask."""
        seen: set[int] = set()
        while id(flag.node) not in seen:
            seen.add(id(flag.node))
            if names.operation(flag.node) in names.SOFTMAX and not any(
                s.nan or s.high for s in self.sources(flag.node)
            ):
                return flag
            sources = [source for source in self.sources(flag.node) if not self.meant(source)]
            if not sources:
                return flag
            flag = min(sources, key=lambda source: source.node.seq)
        return flag


def _in_the_forward(context: Context, found: NonfiniteFacts) -> _Cause | None:
    flags = _Flags(found.flags)
    behind = {id(node) for node in upstream(found.backward.roots)}
    ends = [flags.by[id(root)] for root in found.backward.roots if id(root) in flags.by]
    if not ends:
        ends = [flag for flag in found.flags if id(flag.node) in behind and not flags.meant(flag)][-1:]
    if not ends:
        root = next(iter(found.backward.roots), None)
        if root is None:
            return None
        return _Cause("nonfinite", root.site, "the loss itself is not finite", root, 0.5)
    return _judge(context, flags.origin(ends[0]))


def _judge(context: Context, flag: Flag) -> _Cause:
    """Return what the first value that is not finite says."""
    node = flag.node
    op = names.operation(node)
    what = "NaN" if flag.nan else "infinity" if flag.high else "-infinity" if flag.low else "NaN or infinity"
    operands = flag.operands
    finite = not any(o.get("nan") or o.get("high") or o.get("low") for o in operands)

    def cause(slug: str, why: str, confidence: float = 0.92, place: Site | None = None, fix: str = "") -> _Cause:
        return _Cause(slug, place or node.site, why, node, confidence, fix)

    data = _came_in(node, operands)
    if data is not None:
        return _from_outside(context, node, data)
    if op in names.SOFTMAX and (flag.nan or not operands):
        return cause("nan_softmax_masked", f"`{op}` over a row that is masked as a whole (all -inf) is 0/0 = NaN")
    if any(o.get("low") for o in operands) and op in ("sub", "__sub__", "exp", *names.DIVISION) and flag.nan:
        return cause("nan_softmax_masked", f"`{op}` meets a row that is masked as a whole (all -inf): NaN", 0.8)
    if cast := _narrowed(node):
        return cause("nan_overflow", f"the value is larger than {cast.dtype} can hold", place=cast.site)
    if op in names.LOG and operands:
        return cause("nan_log", f"`{op}` of {_edge(operands[0])} is {what}")
    if op in names.ROOT and operands:
        return cause("nan_sqrt", f"`{op}` of {_edge(operands[0])} is {what}")
    if op in names.POWER and operands and finite and _exponent(node, operands) % 1.0:
        return cause("nan_sqrt", f"a power with a fraction for exponent of {_edge(operands[0])} is {what}")
    if op in names.DIVISION and operands:
        divisor = operands[-1] if len(operands) > 1 or op == "reciprocal" or "r" in op.strip("_")[:1] else None
        if divisor is not None and divisor.get("zeros"):
            return cause("nonfinite", f"division by exactly 0 ({_share(divisor)} of the divisors) is {what}")
    if any(0 in o["shape"] for o in operands) or (op in names.REDUCTION and finite and flag.nan):
        return cause("nonfinite", f"`{op}` of nothing is {what}" + _shapes(operands))
    if finite and not flag.nan and operands:
        return cause(
            "nan_overflow", f"`{op}` of numbers up to {_largest(operands):.3g} leaves the range of {node.dtype}"
        )
    if finite and operands:
        return cause("nonfinite", f"`{op}` of finite numbers ({_edge(operands[0])}) is {what}")
    return cause("nonfinite", f"`{op}` gives the first {what}", 0.75)


def _seen_through(node: Node) -> Node:
    """Return the value that a chain of views shows."""
    while node.op in VIEWS and node.inputs:
        node = node.inputs[0]
    return node


def _came_in(node: Node, operands: list[dict[str, Any]]) -> Node | None:
    """Return the input that was not finite already and was never looked at: data, or a parameter."""
    bad = [operand for operand in operands if operand.get("nan") or operand.get("high")]
    if not bad:
        return None
    for parent in node.inputs:
        at = _seen_through(parent)
        if (not at.trainable or at.leaf) and any(operand["shape"] == tuple(parent.shape) for operand in bad):
            return at
    return None


def _from_outside(context: Context, node: Node, source: Node) -> _Cause:
    op = names.operation(node)
    if not source.leaf or not source.trainable:
        return _Cause(
            "nonfinite",
            node.site,
            f"the data that enters `{op}` holds NaN or infinity already",
            node,
            0.85,
            "clean the data first: x = torch.nan_to_num(x), or drop these rows",
        )
    stepped = [o for o in context.facts.optimizers.values() if o.steps and o.last_step_stack]
    if stepped and context.facts.steps:
        last = max(stepped, key=lambda optimizer: optimizer.last_step_seq)
        return _Cause(
            "nonfinite",
            site(last.last_step_stack[0]),
            f"the parameter was finite and its gradients were; after this step of {last.name} it is not",
            node,
            0.7,
            "look at the learning rate, eps and betas of the optimizer",
        )
    return _Cause("nonfinite", source.site or node.site, "the parameter itself starts with NaN or infinity", node, 0.8)


def _narrowed(node: Node) -> Node | None:
    """Return the cast to a smaller type behind an operation, if its input had a larger one."""
    for at in (node, *node.inputs):
        if names.operation(at) in ("to", "half", "type") and at.inputs and at.dtype != at.inputs[0].dtype:
            return at
    return None


def _exponent(node: Node, operands: list[dict[str, Any]]) -> float:
    numbers = [value for value in node.scalars if isinstance(value, (int, float)) and math.isfinite(value)]
    return float(numbers[-1]) if numbers else 0.5 if len(operands) > 1 else 2.0


def _edge(operand: dict[str, Any]) -> str:
    low, zeros = operand.get("min"), operand.get("zeros") or 0.0
    if low is not None and low < 0.0:
        return f"a negative number ({low:.3g})"
    if zeros:
        return f"exactly 0 ({_share(operand)} of the entries)"
    return f"numbers from {low:.3g} to {operand['max']:.3g}" if low is not None and "max" in operand else "its operand"


def _share(operand: dict[str, Any]) -> str:
    share = operand.get("zeros") or 0.0
    return "all" if share >= 1.0 else f"{share:.1%}"


def _shapes(operands: list[dict[str, Any]]) -> str:
    return f" (shape {list(operands[0]['shape'])})" if operands else ""


def _largest(operands: list[dict[str, Any]]) -> float:
    return max((max(abs(o.get("min", 0.0)), abs(o.get("max", 0.0))) for o in operands), default=0.0)


# ---------------------------------------------------------------------------------------------- backward


def _in_the_backward(context: Context, found: NonfiniteFacts) -> _Cause | None:
    hit = found.hit
    if hit is None or hit.node is None:
        stack = found.backward.stack
        where = site(stack[0]) if stack else None
        return _Cause("nonfinite", where, "the gradient given to backward() is not finite", None, 0.6)
    name = names.function(hit.function)
    saved = [entry for entry in hit.detail["saved"].values() if "zeros" in entry]
    masked, selection = hit.detail["masked"], _selected_after(hit)
    flags = _Flags(found.flags)
    broken = any(entry.get("nan") or entry.get("high") or entry.get("low") for entry in saved)
    if broken or name.endswith("Softmax"):
        flag = flags.by.get(id(hit.node))
        if flag is None:
            near = [f for f in flags.sources(hit.node) if not flags.meant(f)]
            flag = near[0] if near else None
        if flag is not None and not flags.meant(flag):
            return _masked(_judge(context, flags.origin(flag)), selection, hit)
        if name.endswith("Softmax"):
            return _Cause(
                "nan_softmax_masked", hit.node.site, "a row is masked as a whole: its softmax is NaN", hit.node, 0.85
            )
        if broken:
            return _masked(
                _Cause("nonfinite", hit.node.site, f"`{hit.node.op}` saved a value that is not finite", hit.node, 0.8),
                selection,
                hit,
            )
    if masked is not False and selection == "where":
        return _Cause(
            "nan_where",
            hit.node.site,
            f"where() gives the branch that is not taken the gradient 0, and the slope of `{hit.node.op}` there is "
            f"infinite{_operand(saved)}: 0 * inf = NaN",
            hit.node,
            0.93,
        )
    if name in ("Sqrt", "Rsqrt", "Norm", "Cdist", "EuclideanDist", "Hypot") or (name == "Pow" and _fraction(hit)):
        return _Cause(
            "nan_sqrt", hit.node.site, f"the slope of `{hit.node.op}` is infinite at 0{_operand(saved)}", hit.node, 0.93
        )
    if name.startswith(("Log", "Xlog")) and name not in ("LogSoftmax", "Logcumsumexp", "LogSigmoid"):
        return _Cause(
            "nan_log", hit.node.site, f"the slope of `{hit.node.op}` is infinite at 0{_operand(saved)}", hit.node, 0.92
        )
    if found.largest > 1e18 or hit.magnitude > 1e18:
        return exploded(found)
    if masked and selection == "mask":
        return _Cause(
            "nan_masked_late",
            hit.node.site,
            f"the mask comes after `{hit.node.op}`, whose slope is not finite there{_operand(saved)}: 0 * inf = NaN",
            hit.node,
            0.88,
        )
    return _Cause(
        "nonfinite",
        hit.node.site,
        f"the slope of `{hit.node.op}` is not finite for the values it met{_operand(saved)}",
        hit.node,
        0.85,
    )


def _masked(cause: _Cause, selection: str, hit: Hit) -> _Cause:
    """Return the cause of a value that broke in the forward, and was masked before it reached the loss."""
    if cause.slug == "nan_softmax_masked":
        return cause
    if selection == "where":
        return cause._replace(
            slug="nan_where", why=f"{cause.why}; where() drops it, and its gradient 0 * inf is NaN", fix=""
        )
    return cause._replace(
        slug="nan_masked_late", why=f"{cause.why}; it is masked afterwards, and the gradient 0 * NaN is NaN", fix=""
    )


def _selected_after(hit: Hit) -> str:
    """Return what came after the function that broke: "where", "mask", or nothing of the kind."""
    for name, _ in hit.detail["after"][:_AFTER]:
        stem = names.function(name)
        if stem.startswith("Where"):
            return "where"
        if stem.startswith(("Masked", "Mul", "Index", "NanToNum", "Select", "Slice", "Gather")):
            return "mask"
    return ""


def _fraction(hit: Hit) -> bool:
    exponent = hit.detail["saved"].get("exponent", {})
    number = exponent.get("number")
    return isinstance(number, (int, float)) and number < 1.0


def _operand(saved: list[dict[str, Any]]) -> str:
    entry = next((entry for entry in saved if entry.get("zeros")), None)
    return f" ({_share(entry)} of the entries are exactly 0)" if entry is not None else ""


def exploded(found: NonfiniteFacts) -> _Cause:
    """Return the cause for gradients that grew until they left the range."""
    hit = found.hit
    node = hit.node if hit is not None else None
    times = max((times for other, times, _ in found.growth if node is not None and other.site == node.site), default=0)
    if times < 4 and found.growth and found.growth[0][1] >= 8:
        node, times, _ = found.growth[0]
    passes = f" in {times} passes through this line" if times > 3 else ""
    return _Cause(
        "exploded_grad",
        node.site if node is not None else None,
        f"the gradient grows{passes} to {found.largest:.1e}, and then leaves the range of its type",
        node,
        0.88,
    )


RULES: list[Rule] = [nonfinite]
