"""Codecs between an encoder and its projection: none, simulated and packed integers."""
import torch
from torch import nn

CODECS = {}


def codec(name):
    def add(cls):
        CODECS[name] = cls
        cls.name = name
        return cls
    return add


def build_codec(name, bits):
    if name not in CODECS:
        raise KeyError(f"unknown codec {name!r}, known: {', '.join(sorted(CODECS))}")
    return CODECS[name](bits)


@codec("none")
class Identity(nn.Module):
    def __init__(self, bits):
        super().__init__()

    def forward(self, x):
        return x


class IntegerCodec(nn.Module):
    """Symmetric grid of 2^bits levels; the range follows the activations slowly."""

    def __init__(self, bits, momentum=0.1):
        super().__init__()
        self.top = 2 ** (bits - 1) - 1
        self.momentum = momentum
        self.register_buffer("range", torch.zeros(()))

    @torch.no_grad()
    def _track(self, x):
        peak = x.abs().amax()
        if self.range == 0:
            self.range.copy_(peak)
        elif self.training:
            self.range.lerp_(peak, self.momentum)

    def scale(self, x):
        self._track(x)
        return (self.range / self.top).clamp_min(1e-6)


@codec("straight_through")
class Simulated(IntegerCodec):
    def forward(self, x):
        step = self.scale(x)
        grid = torch.round(x / step).clamp(-self.top, self.top) * step
        return x + (grid - x).detach()


@codec("packed")
class Packed(IntegerCodec):
    """Stores eight-bit integers, as the index does."""

    def encode(self, x, step):
        return torch.round(x / step).clamp(-self.top, self.top).to(torch.int8)

    def decode(self, codes, step):
        return codes.to(step.dtype) * step

    def forward(self, x):
        step = self.scale(x)
        return self.decode(self.encode(x, step), step)
