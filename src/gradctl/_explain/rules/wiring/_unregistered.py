"""unregistered_module, not_a_parameter: what hangs on a module and is not in `parameters()`."""

from __future__ import annotations

from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain.rules.wiring._attributes import line_of
from gradctl._explain.rules.wiring._unheld import unheld
from gradctl._lineage import Hidden, Site, Stranger

_TWICE = 2


def unregistered_module(context: Context) -> Iterable[Candidate]:
    """Find layers in Python containers of a module that an optimizer trains."""
    for hidden, found in _grouped(context, layers=True).items():
        first = min(found.values(), key=lambda s: s.born)
        yield Candidate(
            "unregistered_module",
            line_of(hidden.owner, hidden.name, first.stack),
            f"{count(len(found), 'parameter')} of {hidden.owner.__name__}.{hidden.name} get gradients, and "
            "parameters() does not list them",
            f"nn.Module does not look into a {hidden.kind}: what is in it is not registered, and no optimizer gets it",
            fix=_container(hidden),
            # One module that is in eval mode, in a list of its own, is the known way to hide it from parameters().
            confidence=0.4 if hidden.asleep else 0.93,
            evidence=((place(first.stack), "made"), *_built(context)),
            parameters=tuple(found),
            explains="wiring",
            measured={"parameters": float(len(found))},
        )


def not_a_parameter(context: Context) -> Iterable[Candidate]:
    """Find plain tensors of a module that get gradients which nobody reads."""
    for hidden, found in _grouped(context, layers=False).items():
        first = min(found.values(), key=lambda s: s.born)
        what = "a buffer" if hidden.buffer else "the result of an expression" if hidden.derived else "a plain tensor"
        yield Candidate(
            "not_a_parameter",
            line_of(hidden.owner, hidden.name, first.stack),
            f"{hidden.owner.__name__}.{hidden.name} got a gradient in {first.parameter.reached} backwards, and no "
            "optimizer holds it",
            f"it is {what}, not an nn.Parameter: parameters() does not list it",
            fix=f"self.{hidden.name} = torch.nn.Parameter(...)",
            evidence=((place(first.stack), "made"), *_built(context)),
            parameters=tuple(found),
            explains="wiring",
        )


def _grouped(context: Context, *, layers: bool) -> dict[Hidden, dict[int, Stranger]]:
    facts = context.facts
    found: dict[Hidden, dict[int, Stranger]] = {}
    for key, stranger in unheld(context).items():
        if stranger.parameter.reached < _TWICE or not stranger.hidden:
            continue
        in_container = [h for h in stranger.hidden if not h.direct and not h.buffer and not h.derived]
        if stranger.is_parameter and in_container:
            if layers:
                found.setdefault(in_container[0], {})[key] = stranger
            continue
        if layers or stranger.joinings or key in facts.read_by_user or key in facts.differentiated:
            continue
        found.setdefault(stranger.hidden[0], {})[key] = stranger
    return found


def _built(context: Context) -> list[tuple[Site | None, str]]:
    optimizers = [o for o in context.facts.optimizers.values() if o.steps]
    return [(place(optimizer.stack), "optimizer built") for optimizer in optimizers[:1]]


def _container(hidden: Hidden) -> str:
    kind = (
        ("ModuleDict" if hidden.mapping else "ModuleList")
        if hidden.layers
        else ("ParameterDict" if hidden.mapping else "ParameterList")
    )
    return f"self.{hidden.name} = torch.nn.{kind}({'{...}' if hidden.mapping else '[...]'})"
