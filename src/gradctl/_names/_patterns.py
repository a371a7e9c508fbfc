r"""Choosing parameters, modules or anything else that has an FQN, by pattern.

A pattern is one of:

- a glob on FQNs, where `*` also crosses dots: `encoder.*`, `*.bias`, `encoder.layer.1?.*`;
- the name of a module, which means all that lies below it: `head`, `encoder.layer.11`, and as a glob `*.attention`;
- `re:` and a regular expression that must match the whole FQN: `re:encoder\.layer\.([0-9]|10)\..*`;
- a predicate `(name, value) -> bool`;
- a parameter or a module itself: `model.encoder`;
- `!` and one of the strings above, which takes away again what patterns before it have chosen. A list that begins with
  one begins with everything: `"!head"` is all but the head.

A pattern that names nothing, and a `!` that takes nothing away, is an error: what it was meant for is not done.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import Tensor
from torch.nn import Module, Parameter

from gradctl._errors import PatternMatchesNothing, UsageError
from gradctl._names._modules import _WRAPPER_PARTS, _children, _own_parameters

T = TypeVar("T")
Pattern: TypeAlias = str | Callable[[str, Any], bool] | Tensor | Module

_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
_NEAR = 5
_MOST_CANDIDATES = 4000  # difflib needs about 20 us for each


def select(named: Mapping[str, T], patterns: Sequence[Pattern], *, of: str = "parameter") -> dict[str, T]:
    """Choose from `named` what `patterns` say, one pattern after the other.

    Args:
        named: what there is to choose from, by FQN.
        patterns: globs, names of modules, `re:` expressions, predicates, and `!` before a string to take away again.
        of: what `named` holds, for messages.

    Returns:
        The chosen ones, in the order of `named`; nothing if there is no pattern.

    Raises:
        PatternMatchesNothing: a pattern names nothing; near matches are listed.
        UsageError: a pattern is no pattern, or not a valid regular expression.
    """
    if isinstance(patterns, str):  # a str is a sequence of strings, of one letter each
        raise UsageError(f"patterns={patterns!r}", what="a sequence of patterns is needed", fix=f"[{patterns!r}]")
    chosen: set[str] = set()
    for position, pattern in enumerate(patterns):
        takes_away = isinstance(pattern, str) and pattern.startswith("!")
        if takes_away and position == 0:
            chosen.update(named)
        matched = _matched(named, pattern[1:] if takes_away and isinstance(pattern, str) else pattern)
        if not matched:
            raise _matches_nothing(named, pattern, of)
        if not takes_away:
            chosen |= matched
        elif chosen.isdisjoint(matched):
            raise PatternMatchesNothing(
                f"{pattern!r} takes nothing away",
                what=f"it names {_some(sorted(matched))}, which no pattern before it has chosen",
                fix="leave it out, or correct the pattern before it",
            )
        else:
            chosen -= matched
    return {name: value for name, value in named.items() if name in chosen}


def named_parameters(model: Module) -> dict[str, Parameter]:
    """Return every parameter under every FQN that it has: a tied one stands there once for each of its names.

    Names are those of the model inside of DDP, DataParallel and `torch.compile`.
    """
    return parameters_of(named_modules(model))


def parameters_of(modules: Mapping[str, Module]) -> dict[str, Parameter]:
    """Return the parameters of what `named_modules` returned."""
    found: dict[str, Any] = {}
    for path, module in modules.items():
        for name, parameter in _own_parameters(module):
            found[f"{path}.{name}" if path else name] = parameter
    return found


def named_modules(model: Module) -> dict[str, Module]:
    """Return every module under every FQN that it has, the model itself as ""; see `named_parameters`."""
    return dict(_walk(unwrapped(model), "", ()))


def unwrapped(model: Module) -> Module:
    """Return the model inside of DDP, DataParallel and `torch.compile`, in any order; else the model itself."""
    while True:
        child = _WRAPPERS.get(type(model).__name__) if type(model).__module__.startswith("torch.") else None
        inner = dict(_children(model)).get(child) if child is not None else None
        if inner is None:
            return model
        model = inner


def other_names(named: Mapping[str, T]) -> dict[str, tuple[str, ...]]:
    """Return, for each name of an object that has several, the others: `{"lm_head.weight": ("wte.weight",), ...}`."""
    by_object: dict[int, list[str]] = {}
    for name, value in named.items():
        by_object.setdefault(id(value), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in by_object.values()
        if len(names) > 1
        for name in names
    }


def _walk(module: Module, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, Module]]:
    """Yield all paths, also the second one to a shared module; a module inside of itself is not entered again."""
    yield path, module
    above = (*above, id(module))
    for name, child in _children(module):
        if id(child) not in above:
            further = path if f"{name}." in _WRAPPER_PARTS else f"{path}.{name}" if path else name
            yield from _walk(child, further, above)


def _matched(named: Mapping[str, T], pattern: Pattern) -> set[str]:
    if isinstance(pattern, (Tensor, Module)):
        wanted = {id(pattern)}
        if isinstance(pattern, Module):
            wanted |= {id(thing) for part in pattern.modules() for thing in (part, *part.parameters(recurse=False))}
        return {name for name, value in named.items() if id(value) in wanted}
    if not isinstance(pattern, str):
        if not callable(pattern):
            raise UsageError(
                f"the pattern {pattern!r} is a {type(pattern).__name__}",
                what="a pattern is a string or a function (name, value) -> bool",
                fix='for example "encoder.*"',
            )
        return {name for name, value in named.items() if pattern(name, value)}
    if pattern.startswith("re:"):
        try:
            whole = re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression", what=str(error)) from None
        return {name for name in named if whole.fullmatch(name)}
    for part in _WRAPPER_PARTS:  # as `named_parameters()` of a compiled or wrapped model prints them
        pattern = pattern.replace(part, "")
    if pattern in named:
        return {pattern} | {name for name in named if name.startswith(f"{pattern}.")}
    glob = re.compile(fnmatch.translate(pattern))
    return {name for name in named if any(glob.match(part) for part in _prefixes(name))}


def _prefixes(name: str) -> Iterator[str]:
    """Yield the name and the names of the modules above it: `a.b.c`, `a.b`, `a`."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _matches_nothing(named: Mapping[str, Any], pattern: Pattern, of: str) -> PatternMatchesNothing:
    if isinstance(pattern, (Tensor, Module)):
        shape = f" of shape {list(pattern.shape)}" if isinstance(pattern, Tensor) else ""
        return PatternMatchesNothing(
            f"a {type(pattern).__name__}{shape} that is not in the model",
            what=f"it holds, or is, no {of} among the {len(named)} of this model",
            fix="a copy, or a model that was made anew, has others of its own: take it from this model, or by its name",
        )
    if not isinstance(pattern, str):
        shown = getattr(pattern, "__name__", None) or repr(pattern)
        return PatternMatchesNothing(
            f"the predicate {shown} chooses no {of}",
            what=f"it returned False for all {len(named)} names, from {_some(list(named), most=3)}",
            fix=f'it is called with the name and the {of}: lambda name, value: name.endswith("bias")',
        )
    near = near_matches(named, pattern)
    if near:
        advice = f"did you mean {_alternatives(near)}?"
    else:
        tops = list(dict.fromkeys(name.partition(".")[0] for name in named))
        advice = f"the model has {_some(tops, most=8)}" if named else f"there is no {of} at all"
    return PatternMatchesNothing(
        f"{pattern!r} matches no {of}", what=f"none of {len(named)} names matches it", fix=advice
    )


def near_matches(named: Mapping[str, Any], pattern: str) -> list[str]:
    """Return patterns close to one that matches nothing, best first, that do match; at most five."""
    sign, bare = ("!", pattern[1:]) if pattern.startswith("!") else ("", pattern)
    if bare.startswith("re:"):
        kind, tail, wanted = "re:", "", re.sub(r"\\(.)|\(.*?\)[*+?]?|\[.*?\][*+?]?|[.*+?^$|]+$", r"\1", bare[3:])
    else:
        kind, tail = "", ".*" if bare.endswith(".*") else ""
        wanted = bare.removesuffix(".*")
        # The names of a wrapper lie before those that a person knows: peft's `base_model.model.` for one.
        deeper = sorted(_matched(named, f"*.{bare}"), key=lambda name: (name.count("."), name))
        if deeper:
            return [sign + _below(deeper[0], wanted) + tail]
    candidates = list(dict.fromkeys(part for name in named for part in _prefixes(name)))[:_MOST_CANDIDATES]
    lower: dict[str, str] = {}
    for candidate in candidates:
        lower.setdefault(candidate.lower(), candidate)
    # All layers look alike: of the near ones, those of the wanted depth first.
    close = difflib.get_close_matches(wanted.lower(), list(lower), n=3 * _NEAR, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, name, wanted.lower()).ratio() for name in close]
    close = [name for name, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - 0.1]
    close.sort(key=lambda name: name.count(".") != wanted.count("."))
    if kind:
        return [sign + lower[name] for name in close[:_NEAR]]
    return [sign + lower[name] + (tail if lower[name] not in named else "") for name in close[:_NEAR]]


def _below(name: str, wanted: str) -> str:
    """Return the shortest beginning of `name` that ends in what `wanted` matches."""
    glob = re.compile(fnmatch.translate(f"*.{wanted}"))
    return next((part for part in reversed(list(_prefixes(name))) if glob.match(part)), name)


def _alternatives(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _some(names: Sequence[str], *, most: int = _NEAR) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
