"""Rules about order: what clears, replaces, shares or keeps gradients at the wrong time."""

from __future__ import annotations

from gradctl._explain.rules import Rule
from gradctl._explain.rules.order._cleared import grad_cleared, missing_zero_grad, zero_grad_misplaced
from gradctl._explain.rules.order._hooks import grad_overwritten_in_hook
from gradctl._explain.rules.order._kept import history_kept
from gradctl._explain.rules.order._overwritten import grad_aliased, grad_overwritten, grad_read_late
from gradctl._explain.rules.order._read import non_leaf_grad

RULES: list[Rule] = [
    zero_grad_misplaced,
    grad_cleared,
    missing_zero_grad,
    grad_overwritten,
    grad_overwritten_in_hook,
    grad_aliased,
    grad_read_late,
    non_leaf_grad,
    history_kept,
]
