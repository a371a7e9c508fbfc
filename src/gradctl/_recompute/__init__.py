"""What backward remembers: what a region's forward drops, and how it is made again.

`_tape` notes the operations of a region, `_replay` calls them again in backward; `_storage` and `_operations` hold what
they need to know of storages and of schemas. `_api` is the public call.
"""

from __future__ import annotations

from gradctl._recompute._api import Recomputed, kind_of, recompute
from gradctl._recompute._notes import Keep, Made, Operation, RegionPlan, Version
from gradctl._recompute._region import records_graphs, run
from gradctl._recompute._storage import Codec, Verify, dispatches
from gradctl._recompute._tape import Recording, Tape, outer_hooks

__all__ = [
    "Codec",
    "Keep",
    "Made",
    "Operation",
    "Recomputed",
    "Recording",
    "RegionPlan",
    "Tape",
    "Verify",
    "Version",
    "dispatches",
    "kind_of",
    "outer_hooks",
    "recompute",
    "records_graphs",
    "run",
]
