"""What backward will need: the bytes that a graph keeps alive, by operation or by source line.

*By operation* (`walk`) reads a finished graph from its root. `_raw_saved_*` hands out a saved value as it lies there:
its `data` and `unpack_hook` run neither torch's version check nor any hook of the program, so reading a graph under
activation checkpointing recomputes nothing. *By source line* (`arm_lines`) needs saved-tensor hooks and therefore
enters the forward of one step; it is used only when asked for.
"""

from __future__ import annotations

from gradctl._saved._lines import LineWatch, Places, arm_lines
from gradctl._saved._storage import SavedBytes, SavedRow, Tally, storage_keys
from gradctl._saved._walk import Graph, leaves, saved_values, walk

__all__ = [
    "Graph", "LineWatch", "Places", "SavedBytes", "SavedRow", "Tally", "arm_lines", "leaves", "saved_values",
    "storage_keys", "walk",
]  # fmt: skip
