"""Rounding rules for fake quantisation, by name."""

import torch

ROUNDING = {}


def rounding(name):
    def register(fn):
        ROUNDING[name] = fn
        return fn

    return register


class _PassThrough(torch.autograd.Function):
    """Replaces a value in the forward pass and leaves the gradient as it is."""

    @staticmethod
    def forward(ctx, x, rounded):
        return rounded.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@rounding("nearest")
def nearest(x, training):
    return _PassThrough.apply(x, torch.round(x))


@rounding("toward_zero")
def toward_zero(x, training):
    return _PassThrough.apply(x, torch.trunc(x))


@rounding("stochastic")
def stochastic(x, training):
    """Up or down with a probability given by the distance, nearest at evaluation."""
    if not training:
        return torch.round(x)
    noise = torch.rand_like(x)
    return torch.floor(x + noise)
