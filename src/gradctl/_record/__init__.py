"""The flight recorder: what a program's gradients do, written to the journal at almost no cost; never prints.

Three tiers. Tier 0, every step: stamps, the loss, clipping and skips, extended into one flat list (`_hot`, `_blocks`).
Tier 1: one fused norm over all gradients, every step where that is cheap enough (`_norms`). Tier 2: rows of norms,
update ratios and cosines, sampled within a budget of wall time (`_rows`, `_sketch`, `_budget`). A program without an
optimizer is recorded by its backwards (`_fallback`). A fault of ours never reaches the program (`_faults`).
"""

from __future__ import annotations

from gradctl._record._recorder import OnNonFinite, Recorder

__all__ = ["OnNonFinite", "Recorder"]
