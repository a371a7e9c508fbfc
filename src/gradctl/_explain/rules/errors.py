"""Rules, to be written."""

from __future__ import annotations

from gradctl._explain.rules import Rule

RULES: list[Rule] = []
