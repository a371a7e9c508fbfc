"""What to recompute for a byte budget: measure a step, choose, apply, look whether the budget holds.

`_ledger` notes storages, `_profile` runs a step that keeps nothing, `_layout` says how the bytes would move under any
choice, `_solve` chooses, `_plan` is the result and `_forward` puts it to work.
"""

from __future__ import annotations

from gradctl._fit._api import fit
from gradctl._fit._forward import PlanNotFollowed
from gradctl._fit._plan import Plan

__all__ = ["Plan", "PlanNotFollowed", "fit"]
