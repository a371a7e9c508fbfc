"""Synthetic reviews: a few polarity tokens among neutral words."""
import torch
from torch.utils.data import Dataset

PAD, CLS, SEP = 0, 1, 2
POSITIVE = range(10, 20)
NEGATIVE = range(20, 30)
FILLER = range(30, 120)


class Reviews(Dataset):
    def __init__(self, size, seq_len, seed):
        gen = torch.Generator().manual_seed(seed)
        self.rows = [self._row(seq_len, gen) for _ in range(size)]

    @staticmethod
    def _pick(words, count, gen):
        index = torch.randint(len(words), (count,), generator=gen)
        return [words[i] for i in index.tolist()]

    def _row(self, seq_len, gen):
        label = int(torch.randint(3, (1,), generator=gen).item())
        length = int(torch.randint(seq_len // 2, seq_len - 2, (1,), generator=gen).item())
        polar = {0: NEGATIVE, 1: FILLER, 2: POSITIVE}[label]
        body = self._pick(polar, 3, gen) + self._pick(FILLER, length - 3, gen)
        order = torch.randperm(len(body), generator=gen).tolist()
        ids = [CLS] + [body[i] for i in order] + [SEP]
        mask = [1] * len(ids)
        pad = seq_len - len(ids)
        return {
            "input_ids": torch.tensor(ids + [PAD] * pad),
            "attention_mask": torch.tensor(mask + [0] * pad),
            "labels": torch.tensor(label),
        }

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]
