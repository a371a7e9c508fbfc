"""What raises: one rule for each cause that ends a program with an error, except the loss without history (`cuts`)."""

from __future__ import annotations

from gradctl._explain.rules import Rule
from gradctl._explain.rules.errors import arguments, graphs, holders, inplace, reach, values

RULES: list[Rule] = [rule for module in (graphs, inplace, reach, arguments, holders, values) for rule in module.RULES]
