"""Errors about a change in place: of a value that backward needs, of a leaf, of a view, of an inference tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gradctl._explain._context import Candidate, Context, place
from gradctl._explain._cuts import in_region
from gradctl._explain._modules import inplace_definition
from gradctl._explain._raised import Raised, raised
from gradctl._explain._words import word
from gradctl._explain.rules import Rule
from gradctl._explain.rules.errors.graphs import carried
from gradctl._lineage import ErrorFacts, Mutation, Node, Site

_MODIFIED = "modified by an inplace operation"
_VERSIONS = re.compile(r"is at version (\d+); expected version (\d+)")


def inplace_saved(context: Context) -> Iterable[Candidate]:
    """A value that backward needs was overwritten, by the program or by an optimizer."""
    error = raised(context, _MODIFIED)
    if error is None or error.facts is None or error.facts.graph is None:
        return
    savers = _savers(error.facts, error.message)
    found = _overwritten(context, savers, error.message)
    if found is None:
        return
    mutation, saver, exact = found
    certainty = (0.96 if exact else 0.75) * error.certainty
    if mutation.in_optimizer:
        yield _by_optimizer(context, error, mutation, saver, certainty)
        return
    where = place(mutation.stack)
    why = f"`{word(mutation.op)}` changed it after `{word(saver)}` had saved it for its gradient"
    if where is not None and mutation.op in ("relu", "relu_", "dropout", "leaky_relu_", "elu_", "hardtanh_", "silu_"):
        defined = inplace_definition(context, where)
        if defined is not None:
            where, why = (
                defined,
                f"a module with inplace=True changed what `{word(saver)}` had saved for its gradient",
            )
    yield Candidate(
        "inplace_saved",
        where,
        f"backward() refused: a tensor of shape {list(mutation.shape)} was changed in place",
        why,
        confidence=certainty,
        evidence=(
            (saver.site, "saved"),
            (error.here, "backward"),
            *[(place(mutation.stack, d), "called") for d in (1, 2)],
        ),
        node=saver,
        root=error.root,
        explains="error",
    )


def _by_optimizer(context: Context, error: Raised, mutation: Mutation, saver: Node, certainty: float) -> Candidate:
    assert error.facts is not None
    backward = error.facts.backward
    if backward is not None and any(
        earlier.stack[:1] == backward.stack[:1] and saver.seq < earlier.seq
        for earlier in context.facts.backwards
        if earlier is not backward and not earlier.failed
    ):
        stale = carried(error.facts, freed=False)
        if stale is not None:
            return Candidate(
                "stale_graph_carried",
                stale.place,
                "backward() refused: the graph reaches into an earlier step, whose weights the optimizer has changed",
                f"{stale.why}; the weights of that step are gone",
                confidence=certainty,
                evidence=(*stale.evidence, (place(mutation.stack), "step"), (error.here, "backward")),
                node=stale.node,
                root=error.root,
                explains="error",
            )
    return Candidate(
        "optimizer_step_inplace",
        place(mutation.stack),
        "backward() refused: an optimizer has changed weights that this backward still needs",
        f"step() changed a tensor of shape {list(mutation.shape)} in place after `{word(saver)}` had used it in the "
        "forward pass",
        confidence=certainty,
        evidence=((saver.site, "used"), (error.here, "backward")),
        node=saver,
        root=error.root,
        explains="error",
    )


def _savers(facts: ErrorFacts, message: str) -> list[Node]:
    """Return the operations whose saved tensors raise the very message of the error; else those with one like it."""
    same: list[Node] = []
    alike: list[Node] = []
    for function in facts.graph.nodes:
        node = facts.graph.site.get(function)
        if node is None:
            continue
        for name in dir(function):
            if not name.startswith("_saved_") and name != "saved_tensors":
                continue
            try:
                getattr(function, name)
            except RuntimeError as refused:
                text = str(refused)
                if _MODIFIED in text:
                    (
                        same
                        if _VERSIONS.findall(text) == _VERSIONS.findall(message) and text[:140] == message[:140]
                        else alike
                    ).append(node)
            except (AttributeError, TypeError):
                continue
    return same or alike


def _overwritten(context: Context, savers: list[Node], message: str) -> tuple[Mutation, Node, bool] | None:
    """Return the first change of the saved tensor after it was saved, who saved it, and whether that is exact."""
    versions = _VERSIONS.search(message)
    expected = int(versions.group(2)) if versions is not None else None
    mutations = context.facts.mutations
    best: tuple[Mutation, Node, bool] | None = None
    for saver in savers:
        storages = {node.storage for node in (saver, *saver.inputs)} - {0}
        for node in saver.inputs:
            tensor = node.tensor()
            if tensor is not None and node.leaf:
                storages.add(_storage(tensor))
        for mutation in mutations:
            if (
                mutation.storage in storages
                and mutation.seq > saver.seq
                and (expected is None or mutation.before >= expected)
            ):
                if best is None or not best[2] or mutation.seq < best[0].seq:
                    best = (mutation, saver, True)
                break
    if best is not None or expected is None:
        return best
    for saver in savers:
        for mutation in mutations:
            if mutation.before == expected and mutation.seq > saver.seq and _fits(mutation, message):
                return mutation, saver, False
    return None


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return 0


def _fits(mutation: Mutation, message: str) -> bool:
    match = re.search(r"Tensor \[([\d, ]*)\]", message)
    shape = sorted(int(part) for part in match.group(1).split(",") if part.strip()) if match is not None else []
    return any(sorted(known) == shape for known in (mutation.shape, mutation.base_shape) if known is not None)


def leaf_inplace(context: Context) -> Iterable[Candidate]:
    """A leaf that requires a gradient, or a view of one, is changed while autograd records."""
    error = raised(context, "leaf variable that requires grad is being used in an in-place operation")
    if error is None or error.here is None:
        return
    what = "a part of a parameter" if "view" in error.message.lower() else "a parameter"
    yield Candidate(
        "leaf_inplace",
        error.here,
        f"{what} is changed in place while autograd records",
        "a leaf is where gradients arrive: as the result of an operation it would be no leaf any more",
        confidence=0.96 * error.certainty,
        evidence=error.callers,
        explains="error",
    )


def view_inplace(context: Context) -> Iterable[Candidate]:
    """A view that may not be changed in place: one of several, behind a backward hook, of a block without gradients."""
    error = raised(
        context,
        "is a view and is being modified inplace",
        "a view was created in no_grad mode and is being modified",
        "is a view of a view which was created in no_grad",
        "a view was created in inference mode",
    )
    if error is None or error.here is None:
        return
    message = error.message
    if "BackwardHookFunction" in message:
        defined = inplace_definition(context, error.here, _module_of(error))
        yield Candidate(
            "hook_view_inplace",
            defined or error.here,
            "an operation in place behind a module that has a full backward hook",
            "the hook passes the module's output through a function whose view of it may not be changed in place",
            "inplace=False, or an operation that returns a new tensor",
            confidence=0.94 * error.certainty,
            evidence=((error.here, "ran here"), *error.callers),
            explains="error",
        )
        return
    node = error.facts.nodes[0] if error.facts is not None and error.facts.nodes else None
    if "returns multiple views" in message:
        match = re.search(r"Output \d+ of (\w+?)(?:Backward\d*)? is a view", message)
        maker = match.group(1) if match is not None else "an operation"
        yield Candidate(
            "multi_view_inplace",
            error.here,
            f"one of the several views that {maker} returned is changed in place",
            "the history of one output cannot be rewritten without that of the others",
            confidence=0.95 * error.certainty,
            evidence=((node.site if node else None, "made"), *error.callers),
            explains="error",
        )
    elif "no_grad mode" in message or "inference mode" in message:
        cut = in_region(node.region, "the view", node.site) if node is not None and node.region is not None else None
        yield Candidate(
            cut.slug if cut is not None else "no_grad",
            cut.place if cut is not None else error.here,
            "a view that was made without gradients is changed in place where gradients are on",
            cut.why if cut is not None else "what its base should remember of the change is not defined",
            "make the view where gradients are on too, or change both without gradients",
            confidence=0.85 * error.certainty,
            evidence=((error.here, "changed"), *error.callers),
            explains="error",
        )


def detach_view_inplace(context: Context) -> Iterable[Candidate]:
    """`detach_()` of a view."""
    error = raised(context, "Can't detach views in-place")
    if error is None or error.here is None:
        return
    node = error.facts.nodes[0] if error.facts is not None and error.facts.nodes else None
    yield Candidate(
        "detach_view_inplace",
        error.here,
        "detach_() of a view is refused",
        "a view shares the history of its base, which cannot be cut for a part of the memory only",
        "x = x.detach()",
        confidence=0.95 * error.certainty,
        evidence=((node.site if node is not None else None, "made"), *error.callers),
        explains="error",
    )


def inference_tensor(context: Context) -> Iterable[Candidate]:
    """A tensor made in inference mode is recorded, changed or made a leaf outside of it."""
    changed = raised(context, "Inplace update to inference tensor outside InferenceMode")
    error = changed or raised(
        context,
        "Inference tensors cannot be saved for backward",
        "requires_grad=True on inference tensor",
        "Inference tensors do not track version counter",
    )
    if error is None:
        return
    nodes = list(zip(error.facts.nodes, error.facts.inference, strict=False)) if error.facts is not None else []
    node = next((node for node, inference in nodes if inference), None)
    where: Site | None = None
    why = "a tensor made in inference mode has no version counter, and can never be a part of a graph"
    evidence: tuple[tuple[Site | None, str], ...] = ()
    if node is not None and node.region is not None and node.region.library != "library":
        cut = in_region(node.region, f"`{word(node)}`", node.site)
        where, why, evidence = cut.place, f"{cut.why}; {why}", cut.evidence
    elif node is not None:
        where = node.site
    yield Candidate(
        "inference_inplace" if changed is not None else "inference_mode",
        where or error.here,
        "a tensor made in inference mode is changed in place outside of it"
        if changed is not None
        else "a tensor made in inference mode is used where autograd has to record",
        why,
        confidence=(0.95 if where is not None else 0.6) * error.certainty,
        evidence=(*evidence, (node.site if node is not None else None, "made"), (error.here, "used")),
        explains="error",
    )


def _module_of(error: Raised) -> Any:
    """Return the module whose forward raised."""
    for frame, _ in reversed(error.frames):
        if frame.f_code.co_name == "forward":
            return frame.f_locals.get("self")
    return None


RULES: list[Rule] = [inplace_saved, leaf_inplace, view_inplace, detach_view_inplace, inference_tensor]
