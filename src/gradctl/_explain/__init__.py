"""Why a gradient is missing, zero, non-finite, stale or overwritten: one rule for each root cause, over the facts."""

from __future__ import annotations

from gradctl._explain._held import largest
from gradctl._explain._sentinel import Sentinel
from gradctl._explain._step import Examined, examine, explain
from gradctl._explain._symptoms import Symptom
from gradctl._explain._tracing import Tracing
from gradctl._explain._watch import Watch, check, script, watch, watched

__all__ = [
    "Examined",
    "Sentinel",
    "Symptom",
    "Tracing",
    "Watch",
    "check",
    "examine",
    "explain",
    "largest",
    "script",
    "watch",
    "watched",
]
