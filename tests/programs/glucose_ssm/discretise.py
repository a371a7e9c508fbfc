"""From a continuous diagonal system to one step of irregular length."""

import torch

RULES = {}


def rule(name):
    def register(fn):
        RULES[name] = fn
        return fn

    return register


@rule("euler")
def euler(rate, delta):
    """Returns decay and input gain of ``h' = rate * h + u`` over ``delta``."""
    return 1.0 + rate * delta, delta.expand_as(rate * delta)


@rule("bilinear")
def bilinear(rate, delta):
    half = 0.5 * rate * delta
    return (1.0 + half) / (1.0 - half), delta / (1.0 - half)


@rule("zoh")
def zero_order_hold(rate, delta, eps=1e-6):
    z = rate * delta
    ratio = torch.expm1(z) / z
    gain = torch.where(z.abs() > eps, ratio, torch.ones_like(z))
    return z.exp(), gain * delta
