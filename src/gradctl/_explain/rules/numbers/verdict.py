"""What one rule of zeros says to another."""

from __future__ import annotations

from typing import NamedTuple

from gradctl._lineage import Node, Site


class Swallowed(NamedTuple):
    """Why an operation hands no gradient on."""

    slug: str
    place: Site | None
    why: str
    node: Node
    confidence: float
    fix: str = ""
    evidence: tuple[tuple[Site | None, str], ...] = ()


def named(node: Node) -> str:
    """Return the name of an operation as a person writes it."""
    words = {
        "__mul__": "*",
        "__rmul__": "*",
        "__matmul__": "@",
        "__truediv__": "/",
        "__add__": "+",
        "__sub__": "-",
        "__pow__": "**",
    }
    return words.get(node.op, node.op.removesuffix(".apply"))
