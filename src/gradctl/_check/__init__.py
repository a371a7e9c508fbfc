"""`gradctl.check`: is a derivative the derivative of what was computed, and if not, how is it wrong."""

from __future__ import annotations

from gradctl._check._check import check

__all__ = ["check"]
