"""The path of a finding in one line: from a parameter through what was computed to the loss, the cut marked."""

from __future__ import annotations

from gradctl._explain._context import Candidate, Context, chain
from gradctl._lineage import Node

_LONGEST = 9
_WORDS = {"__getitem__": "index", "__matmul__": "matmul", "__rmatmul__": "matmul", "__setitem__": "setitem"}


def path_line(context: Context, candidate: Candidate) -> str:
    """Return `img.weight → linear → ✗ detach → stack → loss`; empty when the values between are not known."""
    below, above, ends = chain(context, candidate)
    words: list[str] = []
    for position, node in enumerate(below):
        word = _word(context, node)
        if node is candidate.node and not candidate.left and (position or not node.leaf):
            words.append(f"✗ {word}")
        elif not words or words[-1] != word:
            words.append(word)
    if candidate.left:
        words.append(f"✗ {candidate.left}")
    cut = len(words) - 1
    if candidate.left and above:
        words.append("…")
    for node in above:
        word = _word(context, node)
        if words[-1] != word:
            words.append(word)
    if ends:
        words.append("loss")
    return " → ".join(_shortened(words, cut)) if len(words) > 1 else ""


def _word(context: Context, node: Node) -> str:
    if node.leaf and not node.inputs:
        key = context.key_of(node)
        return (context.name(key) if key is not None else None) or f"leaf {list(node.shape)}"
    name = node.op.removesuffix(".__get__").removesuffix(".apply")
    name = _WORDS.get(name, name)
    return name.strip("_") or name


def _shortened(words: list[str], cut: int) -> list[str]:
    """Leave out the middle of what is too long, never the ends, nor the cut and its neighbours."""
    if len(words) <= _LONGEST:
        return words
    keep = {0, 1, len(words) - 2, len(words) - 1, *(cut + d for d in (-2, -1, 0, 1, 2) if cut >= 0)}
    shown: list[str] = []
    for position, word in enumerate(words):
        if position in keep:
            shown.append(word)
        elif shown[-1] != "…":
            shown.append("…")
    return shown
