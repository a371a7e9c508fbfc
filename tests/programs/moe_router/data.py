"""Sequences labelled by the group that most of their tokens come from."""

from __future__ import annotations

import torch


class Sequences:
    def __init__(self, vocab: int, length: int, classes: int, seed: int):
        self.vocab, self.length, self.classes = vocab, length, classes
        self.rng = torch.Generator().manual_seed(seed)

    def _randint(self, low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=self.rng)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        label = self._randint(0, self.classes, count)
        group = (self.vocab - 1) // self.classes
        own = 1 + label[:, None] * group + self._randint(0, group, count, self.length)
        other = self._randint(1, self.vocab, count, self.length)
        tokens = torch.where(torch.rand(count, self.length, generator=self.rng) < 0.75, own, other)
        length = self._randint(self.length // 2, self.length + 1, count)
        tokens[torch.arange(self.length)[None] >= length[:, None]] = 0
        return tokens, label
