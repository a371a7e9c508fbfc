"""unregistered_module, not_a_parameter: what hangs on a module and is not in `parameters()`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Module, Parameter

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain.rules.wiring._attributes import Attribute, hidden_attributes, line_of
from gradctl._explain.rules.wiring._ownership import Ownership
from gradctl._lineage import ParameterFacts, Stack, upstream

_TWICE = 2


@dataclass(slots=True)
class _Lost:
    attribute: Attribute
    keys: set[int] = field(default_factory=set[int])
    stack: Stack = ()


def unregistered_module(context: Context) -> Iterable[Candidate]:
    """Find layers in Python containers of a module that an optimizer trains."""
    for lost in _hidden(context, layers=True):
        attribute = lost.attribute
        modules = _modules_in(attribute.value)
        # One frozen-looking module in a list of its own is the known way to hide it from parameters().
        hidden = len(modules) == 1 and not modules[0].training
        kind = type(attribute.value).__name__
        owner = type(attribute.owner).__name__
        yield Candidate(
            "unregistered_module",
            line_of(attribute, lost.stack),
            f"{count(len(lost.keys), 'parameter')} of {owner}.{attribute.name} get gradients, and parameters() does not "
            "list them",
            f"nn.Module does not look into a Python {kind}: what {attribute.name} holds is not registered, and no "
            "optimizer gets it",
            fix=_container(attribute),
            confidence=0.4 if hidden else 0.93,
            evidence=(
                (place(lost.stack), "made"),
                *[(place(o.stack), "optimizer built") for o in Ownership(context).stepping()][:1],
            ),
            parameters=tuple(lost.keys),
            explains="wiring",
        )


def not_a_parameter(context: Context) -> Iterable[Candidate]:
    """Find plain tensors of a module that get gradients which nobody reads."""
    for lost in _hidden(context, layers=False):
        attribute = lost.attribute
        owner = type(attribute.owner).__name__
        buffer = attribute.name in attribute.owner._buffers
        wrapped = any(not tensor.is_leaf for tensor in attribute.tensors)
        what = "a buffer" if buffer else "the result of an expression" if wrapped else "a plain tensor"
        made = place(lost.stack)
        yield Candidate(
            "not_a_parameter",
            line_of(attribute, lost.stack) or made,
            f"{owner}.{attribute.name} gets a gradient in every step, and no optimizer holds it",
            f"it is {what}, not an nn.Parameter: parameters() does not list it",
            fix=f"self.{attribute.name} = torch.nn.Parameter(...)",
            confidence=0.9,
            evidence=((made, "made"),),
            parameters=tuple(lost.keys),
            explains="wiring",
        )


def _hidden(context: Context, *, layers: bool) -> list[_Lost]:
    """Return the attributes of trained models that hold leaves whose gradients nobody uses."""
    ownership = Ownership(context)
    if not ownership.stepping():
        return []
    wanted: dict[int, tuple[ParameterFacts, Tensor]] = {
        key: (parameter, leaf) for key, parameter, leaf in ownership.unheld() if parameter.reached >= _TWICE
    }
    in_layers = {key for key in wanted if key in ownership.owners}
    facts = context.facts
    if layers:
        wanted = {key: value for key, value in wanted.items() if isinstance(value[1], Parameter)}
    else:
        wanted = {
            key: value
            for key, value in wanted.items()
            if key not in in_layers and key not in facts.read_by_user and key not in facts.differentiated
        }
    if not wanted:
        return []
    found: list[_Lost] = []
    for module in ownership.modules():
        above = [module, *ownership.ancestors(module, before=1 << 62)]
        if not any(ownership.is_held_in(m) for m in above):
            continue
        listed = {id(parameter) for parameter in module.parameters()}
        for attribute in hidden_attributes(module):
            keys = _keys(context, attribute, wanted, layers=layers) - listed
            if keys:
                stack = wanted[min(keys, key=lambda k: wanted[k][0].node.seq)][1]
                made = context.tracer.created.get(stack) or context.facts.parameters[id(stack)].node.stack
                found.append(_Lost(attribute, keys, made))
    return found


def _keys(
    context: Context, attribute: Attribute, wanted: dict[int, tuple[ParameterFacts, Tensor]], *, layers: bool
) -> set[int]:
    direct = {id(tensor) for tensor in attribute.tensors} & set(wanted)
    container = not isinstance(attribute.value, Tensor)
    if layers:
        return direct if container else set()
    keys = {key for key in direct if not (container and isinstance(wanted[key][1], Parameter))}
    nodes = {id(parameter.node): key for key, (parameter, _) in wanted.items()}
    for tensor in attribute.tensors:
        if tensor.is_leaf or (node := context.tracer.map.get(tensor)) is None:
            continue
        keys |= {nodes[id(above)] for above in upstream([node], live=True) if id(above) in nodes}
    return keys


def _modules_in(value: object) -> list[Module]:
    if isinstance(value, Module):
        return [value]
    items: list[object] = []
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
    return [module for item in items[:64] for module in _modules_in(item)]


def _container(attribute: Attribute) -> str:
    modules = bool(_modules_in(attribute.value))
    name = ("ModuleDict" if modules else "ParameterDict") if isinstance(attribute.value, dict) else (
        "ModuleList" if modules else "ParameterList"
    )
    inner = "{...}" if isinstance(attribute.value, dict) else "[...]"
    return f"self.{attribute.name} = torch.nn.{name}({inner})"
