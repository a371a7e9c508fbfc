"""Rules about who holds what: gradients that no optimizer uses, and parameters that an optimizer holds in vain."""

from __future__ import annotations

from gradctl._explain.rules import Rule
from gradctl._explain.rules.wiring._empty_group import empty_group
from gradctl._explain.rules.wiring._frozen import frozen_params
from gradctl._explain.rules.wiring._idle import unused_param
from gradctl._explain.rules.wiring._unheld import param_not_in_optimizer
from gradctl._explain.rules.wiring._unregistered import not_a_parameter, unregistered_module

RULES: list[Rule] = [
    param_not_in_optimizer,
    empty_group,
    unregistered_module,
    not_a_parameter,
    frozen_params,
    unused_param,
]
