"""Where gradients come from: a tracer that keeps the lineage of values, through breaks, and the facts of each step.

Facts only; nothing here judges. A `Trace` listens through `_taps` and one TorchFunctionMode for each thread, keeps no
tensor alive, replaces no result and never raises into the program.
"""

from __future__ import annotations

from gradctl._lineage._backward import Graph
from gradctl._lineage._breaks import Break, note_breaks
from gradctl._lineage._facts import (
    BackwardFacts,
    ErrorFacts,
    Escape,
    Facts,
    FlagChange,
    GradEvent,
    Held,
    Hidden,
    Hit,
    HookFacts,
    Joining,
    Kept,
    Mutation,
    NonfiniteFacts,
    OptimizerFacts,
    ParameterFacts,
    Placement,
    Reused,
    Shared,
    Stranger,
    Taken,
)
from gradctl._lineage._forward import Flag
from gradctl._lineage._frames import Frames, Site, Stack, is_own, site, sites, source
from gradctl._lineage._node import Node, Region
from gradctl._lineage._operations import CASTS, COMPARISONS, VIEWS
from gradctl._lineage._trace import Trace, let_workers_finish
from gradctl._lineage._tracer import FREED, NODE, Tracer, grad_fn_of
from gradctl._lineage._walk import (
    Unreached,
    breaks,
    live_leaves,
    meant_breaks,
    path,
    sufficient_breaks,
    sum_of,
    upstream,
)

__all__ = [
    "CASTS",
    "COMPARISONS",
    "FREED",
    "NODE",
    "VIEWS",
    "BackwardFacts",
    "Break",
    "ErrorFacts",
    "Escape",
    "Facts",
    "Flag",
    "FlagChange",
    "Frames",
    "GradEvent",
    "Graph",
    "Held",
    "Hidden",
    "Hit",
    "HookFacts",
    "Joining",
    "Kept",
    "Mutation",
    "Node",
    "NonfiniteFacts",
    "OptimizerFacts",
    "ParameterFacts",
    "Placement",
    "Region",
    "Reused",
    "Shared",
    "Site",
    "Stack",
    "Stranger",
    "Taken",
    "Trace",
    "Tracer",
    "Unreached",
    "breaks",
    "grad_fn_of",
    "is_own",
    "let_workers_finish",
    "live_leaves",
    "meant_breaks",
    "note_breaks",
    "path",
    "site",
    "sites",
    "source",
    "sufficient_breaks",
    "sum_of",
    "upstream",
]
