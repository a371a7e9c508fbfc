"""Fake-quantised layers with learned step sizes (weights) and running ranges (activations)."""

import torch
from torch import nn
from torch.nn import functional as F

from rounding import ROUNDING


class QuantSwitch:
    """Mixin: a layer that can run in float until quantisation is turned on."""

    quantised = False

    def enable_quant(self, on=True):
        self.quantised = on
        return self


class WeightQuantizer(nn.Module):
    """Symmetric per-channel grid; the step size is a parameter."""

    def __init__(self, channels, bits, rule):
        super().__init__()
        self.qmax = 2 ** (bits - 1) - 1
        self.rule = ROUNDING[rule]
        self.log_step = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def calibrate(self, weight):
        peak = weight.flatten(1).abs().amax(dim=1).clamp(min=1e-5)
        self.log_step.copy_((peak / self.qmax).log())

    def forward(self, weight):
        step = self.log_step.exp().view(-1, *[1] * (weight.dim() - 1))
        grid = self.rule((weight / step).clamp(-self.qmax, self.qmax), self.training)
        return grid * step


class ActivationQuantizer(nn.Module):
    """Unsigned grid whose range follows the data."""

    def __init__(self, bits, rule, momentum=0.1):
        super().__init__()
        self.levels, self.momentum = 2**bits - 1, momentum
        self.rule = ROUNDING[rule]
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                now = torch.quantile(x.detach().flatten()[:4096], 0.999)
                self.peak.copy_(now if self.peak == 0 else torch.lerp(self.peak, now, self.momentum))
        step = (self.peak / self.levels).clamp(min=1e-6)
        return self.rule((x / step).clamp(0, self.levels), self.training) * step


class QuantConv(QuantSwitch, nn.Conv1d):
    def __init__(self, cin, cout, kernel, cfg, **kwargs):
        super().__init__(cin, cout, kernel, **kwargs)
        self.weight_quant = WeightQuantizer(cout, cfg.weight_bits, cfg.weight_rounding)
        self.act_quant = ActivationQuantizer(cfg.act_bits, cfg.act_rounding)

    def forward(self, x):
        if not self.quantised:
            return F.relu(self._conv_forward(x, self.weight, self.bias))
        weight = self.weight_quant(self.weight)
        return self.act_quant(F.relu(self._conv_forward(x, weight, self.bias)))


class QuantLinear(QuantSwitch, nn.Linear):
    def __init__(self, cin, cout, cfg):
        super().__init__(cin, cout)
        self.weight_quant = WeightQuantizer(cout, cfg.weight_bits, cfg.weight_rounding)

    def forward(self, x):
        weight = self.weight_quant(self.weight) if self.quantised else self.weight
        return F.linear(x, weight, self.bias)


def start_quantisation(model):
    """Set the step sizes from the float weights and switch every layer over."""
    layers = [m for m in model.modules() if isinstance(m, QuantSwitch)]
    for layer in layers:
        layer.weight_quant.calibrate(layer.weight)
        layer.enable_quant()
    return len(layers)


@torch.no_grad()
def export_int8(model):
    out = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantSwitch):
            step = layer.weight_quant.log_step.exp().view(-1, *[1] * (layer.weight.dim() - 1))
            qmax = layer.weight_quant.qmax
            out[name] = (layer.weight / step).round().clamp(-qmax, qmax).to(torch.int8)
    return out
