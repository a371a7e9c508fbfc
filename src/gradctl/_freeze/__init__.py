"""Freeze and unfreeze parameters by name: whole tensors, rows of one, on a schedule; say what trains and why."""
