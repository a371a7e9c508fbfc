"""Arithmetic token sequences with a scalar score for each."""
import torch


class SequenceSource:
    def __init__(self, vocab_size, seq_len, seed):
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.gen = torch.Generator().manual_seed(seed)

    def batch(self, size):
        start = torch.randint(self.vocab_size, (size, 1), generator=self.gen)
        stride = torch.randint(1, 4, (size, 1), generator=self.gen)
        tokens = (start + stride * torch.arange(self.seq_len)) % self.vocab_size
        score = (stride.float().squeeze(1) - 2.0) / 2.0
        return tokens, score

    def prompts(self, size, length=4):
        return self.batch(size)[0][:, :length]
