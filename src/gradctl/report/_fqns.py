"""Many parameter names in few words: `encoder.layer.{0..11}.attention.*`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Parts = tuple[str, ...]
_SPELLED = 3
"""So many alternatives are spelled out in braces; of more, a few and a count."""


def collapse(names: Iterable[str], known: Sequence[str] = ()) -> list[str]:
    """Return patterns that stand for `names` and for no other name of `known`.

    Args:
        names: fully qualified names.
        known: all names that there are: only then is it known where `*` would mean no other one. What stands beside a
            name that is not among them (no optimizer holds it) is not known: there `*` is one module's own parameters.

    Returns:
        Patterns in the order of the first name that each stands for. `{0..11}` is a range of numbers, `{a,b}` are
        alternatives, `*` is everything below.
    """
    found = list(dict.fromkeys(tuple(name.split(".")) for name in names))
    if known:
        found = _starred(found, {tuple(name.split(".")) for name in known})
    found = _joined(found, _range)
    found = _joined(found, _alternatives)
    return [".".join(parts) for parts in found]


def _starred(meant: Sequence[Parts], known: set[Parts]) -> list[Parts]:
    """Put `prefix.*` for the names below a prefix where no other name is below it."""
    totals: dict[Parts, int] = {}
    for parts in known | set(meant):
        for length in range(1, len(parts)):
            totals[parts[:length]] = totals.get(parts[:length], 0) + 1
    inside: dict[Parts, int] = {}
    for parts in meant:
        for length in range(1, len(parts)):
            inside[parts[:length]] = inside.get(parts[:length], 0) + 1
    found: dict[Parts, None] = {}
    for parts in meant:
        whole = (
            parts[:length]
            for length in range(1 if parts in known else len(parts) - 1, len(parts))
            if length and 1 < totals[parts[:length]] == inside[parts[:length]] and not parts[length].isdecimal()
        )
        prefix = next(whole, None)
        found[(*prefix, "*") if prefix is not None else parts] = None
    return list(found)


def _joined(found: list[Parts], write: Callable[[list[str]], str | None]) -> list[Parts]:
    """Join patterns that differ in one part, from the left, where `write` has a word for the parts in which they do."""
    for place in range(max((len(parts) for parts in found), default=0)):
        groups: dict[tuple[Parts, Parts] | Parts, list[Parts]] = {}
        for parts in found:
            key = (parts[:place], parts[place + 1 :]) if place < len(parts) and parts[place] != "*" else parts
            groups.setdefault(key, []).append(parts)
        found = []
        for group in groups.values():
            word = write([parts[place] for parts in group]) if len(group) > 1 else None
            found += group if word is None else [(*group[0][:place], word, *group[0][place + 1 :])]
    return found


def _range(words: list[str]) -> str | None:
    if not all(word.isdecimal() for word in words):
        return None
    numbers = sorted({int(word) for word in words})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spelled = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(spelled) + "}"


def _alternatives(words: list[str]) -> str | None:
    if any(word.isdecimal() or word.startswith("{") for word in words):
        return None
    shown = words if len(words) <= _SPELLED + 1 else [*words[:_SPELLED], f"... {len(words) - _SPELLED} more"]
    return "{" + ",".join(shown) + "}"
