"""What a journal says: one sentence, eight figures, findings. Sees only the journal; imports no torch."""

from __future__ import annotations

from gradctl._verdict._statement import Figure, Level, Verdict

__all__ = ["Figure", "Level", "Verdict"]
