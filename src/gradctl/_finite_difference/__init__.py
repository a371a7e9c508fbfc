"""Directional derivatives by finite differences in float64, and how two derivatives differ."""

from __future__ import annotations

from gradctl._finite_difference._function import compare_function, compare_in_double, function_subject, mismatches
from gradctl._finite_difference._mismatch import Comparison, Mismatch
from gradctl._finite_difference._point import Subject
from gradctl._finite_difference._search import REORDERED, compare

__all__ = [
    "REORDERED",
    "Comparison",
    "Mismatch",
    "Subject",
    "compare",
    "compare_function",
    "compare_in_double",
    "function_subject",
    "mismatches",
]
