"""What backward remembers: what a region's forward drops, and how it is made again.

`_tape` notes the operations of a region, `_replay` calls them again in backward; `_storage` and `_operations` hold what
they need to know of storages and of schemas. `_api` is the public call.
"""

from __future__ import annotations

from gradctl._recompute._api import Recomputed, recompute
from gradctl._recompute._notes import Made, RegionPlan
from gradctl._recompute._region import run
from gradctl._recompute._tape import Tape

__all__ = ["Made", "Recomputed", "RegionPlan", "Tape", "recompute", "run"]
