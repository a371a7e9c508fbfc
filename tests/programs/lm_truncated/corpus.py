"""Text streams drawn from Markov chains, one chain per author."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class Corpus:
    def __init__(self, vocab: int, authors: int, seed: int):
        self.rng = torch.Generator().manual_seed(seed)
        self.vocab, self.authors = vocab, authors
        scores = 2.5 * torch.randn(authors, vocab, vocab, generator=self.rng)
        scores = scores + 2.5 * torch.randn(authors, 1, vocab, generator=self.rng)
        self.transitions = scores.softmax(dim=-1)

    def stream(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        author = torch.arange(batch) % self.authors
        token = torch.randint(0, self.vocab, (batch,), generator=self.rng)
        columns = [token]
        for _ in range(length):
            rows = self.transitions[author, columns[-1]]
            columns.append(torch.multinomial(rows, 1, generator=self.rng).squeeze(1))
        return torch.stack(columns), author

    def windows(self, batch: int, length: int, window: int) -> Iterator[tuple[torch.Tensor, ...]]:
        text, author = self.stream(batch, length)
        for start in range(0, length, window):
            yield text[start : start + window], text[start + 1 : start + window + 1], author
