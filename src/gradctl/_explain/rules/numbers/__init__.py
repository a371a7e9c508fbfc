"""Numbers that went wrong: NaN and infinity, gradients of zero or close to it, edits that backward cannot see."""

from __future__ import annotations

from gradctl._explain.rules import Rule
from gradctl._explain.rules.numbers import functions, growth, nonfinite, single, zeros

RULES: list[Rule] = [*nonfinite.RULES, *growth.RULES, *zeros.RULES, *single.RULES, *functions.RULES]
