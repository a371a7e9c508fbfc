"""Differential operators on a scalar field, by name.

Every operator takes a :class:`Field` and returns one column with the value at each collocation point.
"""

import torch

OPERATORS = {}


def operator(name):
    def register(fn):
        OPERATORS[name] = fn
        return fn

    return register


class Field:
    """The network's output together with the points it was computed at; derivatives are cached."""

    def __init__(self, net, points):
        self.axes = {"x": points[:, :1].requires_grad_(True), "t": points[:, 1:].requires_grad_(True)}
        self.value = net(torch.cat([self.axes["x"], self.axes["t"]], dim=1))
        self._first = {}

    def first(self, axis):
        if axis not in self._first:
            self._first[axis] = gradient(self.value, self.axes[axis])
        return self._first[axis]


def gradient(value, wrt):
    (out,) = torch.autograd.grad(value, wrt, torch.ones_like(value), create_graph=True)
    return out


def derivative(value, wrt, order):
    """The derivative of the given order, by repeated differentiation."""
    for remaining in range(order, 0, -1):
        (value,) = torch.autograd.grad(
            value, wrt, torch.ones_like(value), retain_graph=True, create_graph=remaining > 1
        )
    return value


@operator("time")
def time_derivative(field, coefficient=1.0):
    return coefficient * field.first("t")


@operator("advection")
def advection(field, coefficient=6.0):
    return coefficient * field.value * field.first("x")


@operator("dispersion")
def dispersion(field, coefficient=1.0):
    return coefficient * derivative(field.value, field.axes["x"], order=3)


@operator("slope")
def slope(field, coefficient=1.0):
    return coefficient * field.first("x")


class Residual:
    """Sum of operators, from a list of (name, coefficient)."""

    def __init__(self, terms):
        unknown = [n for n, _ in terms if n not in OPERATORS]
        if unknown:
            raise KeyError(f"no operator {unknown}")
        self.terms = [(name, OPERATORS[name], c) for name, c in terms]
        self.last = {}

    def __call__(self, field):
        parts = {name: fn(field, c) for name, fn, c in self.terms}
        self.last = {name: v.detach().abs().mean().item() for name, v in parts.items()}
        return sum(parts.values())
