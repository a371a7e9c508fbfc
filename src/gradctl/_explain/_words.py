"""What operations and places are called in a sentence."""

from __future__ import annotations

from gradctl._lineage import Node

_WORDS = {"__getitem__": "index", "__matmul__": "matmul", "__rmatmul__": "matmul", "__setitem__": "x[...] = y"}


def word(node: Node | str | None) -> str:
    """Return an operation's name as people write it: `relu`, `matmul`, `+=`."""
    if node is None:
        return "an operation"
    name = (node if isinstance(node, str) else node.op).removesuffix(".__get__").removesuffix(".apply")
    if name in _WORDS:
        return _WORDS[name]
    if name.startswith("__i") and name not in ("__invert__", "__index__", "__iter__"):
        return {"add": "+=", "sub": "-=", "mul": "*=", "truediv": "/="}.get(name.strip("_")[1:], name.strip("_"))
    return name.strip("_") or name


def at(node: Node) -> str:
    """Return the user line of a node as `file.py:12`."""
    where = node.site
    return "a line of a library" if where is None else f"{where.file.rpartition('/')[2]}:{where.line}"
