"""Irregular sensor series with gaps, missing values and padding."""

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    value: torch.Tensor
    seen: torch.Tensor
    delta: torch.Tensor
    length: torch.Tensor
    target: torch.Tensor

    @property
    def valid(self):
        steps = torch.arange(self.value.shape[1])
        return steps[None] < self.length[:, None]


class GlucoseLog:
    """One patient after the other; the later ones wear a sensor that logs some readings twice."""

    def __init__(self, seed, channels=3, longest=24, double_after=13):
        self.gen = torch.Generator().manual_seed(seed)
        self.channels, self.longest = channels, longest
        self.double_after = double_after
        self.served = 0

    def _times(self, count):
        gap = 0.2 + torch.rand(count, self.longest, generator=self.gen)
        if self.served > self.double_after:
            twice = torch.rand(count, self.longest, generator=self.gen) < 0.04
            gap = gap.masked_fill(twice, 0.0)
        gap[:, 0] = 1.0
        return gap.cumsum(dim=1)

    def batch(self, count):
        self.served += 1
        time = self._times(count)
        level = 0.5 * torch.randn(count, 1, generator=self.gen)
        phase = 6.28 * torch.rand(count, 1, self.channels, generator=self.gen)
        wave = torch.sin(0.7 * time[:, :, None] + phase) + level[:, :, None]
        value = wave + 0.1 * torch.randn(wave.shape, generator=self.gen)
        seen = torch.rand(wave.shape, generator=self.gen) > 0.15
        value = torch.where(seen, value, torch.zeros_like(value))
        length = torch.randint(self.longest // 2, self.longest + 1, (count,), generator=self.gen)
        last = length - 1
        ahead = time[torch.arange(count), last] + 0.5
        target = torch.sin(0.7 * ahead[:, None] + phase[:, 0]).mean(dim=1) + level[:, 0]
        delta = torch.diff(time, dim=1, prepend=time[:, :1] - 1.0)
        return Batch(value, seen.float(), delta, length, target)
