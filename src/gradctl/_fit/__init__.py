"""What to recompute for a byte budget: measure a step, choose, apply, look whether the budget holds.

`_ledger` notes storages, `_profile` runs a step that keeps nothing, `_layout` says how the bytes would move under any
choice, `_solve` chooses, `_plan` is the result and `_forward` puts it to work; `_script` does all that
in a script whose steps cannot be called.

`memory` is the meter: `_allocator` hears what allocators do, `_memory_watch` watches a step, `_memory_facts` reads off
the report (`_memory_report`), and `_memory_viz` writes it for pytorch.org/memory_viz.
"""

from __future__ import annotations

from gradctl._fit._api import fit
from gradctl._fit._forward import PlanNotFollowed
from gradctl._fit._memory import memory
from gradctl._fit._memory_facts import report_of
from gradctl._fit._memory_report import MemoryReport
from gradctl._fit._memory_viz import snapshot, write_pickle
from gradctl._fit._memory_watch import StepWatch
from gradctl._fit._plan import Plan
from gradctl._fit._script import ScriptFit, ScriptPlan

__all__ = [
    "MemoryReport",
    "Plan",
    "PlanNotFollowed",
    "ScriptFit",
    "ScriptPlan",
    "StepWatch",
    "fit",
    "memory",
    "report_of",
    "snapshot",
    "write_pickle",
]
