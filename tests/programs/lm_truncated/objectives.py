"""Cross entropy, activation regularisers and the triplet term."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def triplet(vectors: torch.Tensor, author: torch.Tensor, margin: float) -> tuple[torch.Tensor, int]:
    """Mean over the triplets that break the margin; an exact zero if none does."""
    distance = 1.0 - vectors @ vectors.T
    same = author[:, None] == author[None]
    positive = same & ~torch.eye(len(author), dtype=torch.bool)
    gap = distance.unsqueeze(2) - distance.unsqueeze(1) + margin
    valid = positive.unsqueeze(2) & ~same.unsqueeze(1)
    broken = F.relu(gap) * valid
    active = int((broken > 0).sum())
    return broken.sum() / max(active, 1), active


def regularisers(out: dict, activity: float, slowness: float) -> torch.Tensor:
    hidden, dropped = out["hidden"], out["dropped"]
    change = (hidden[1:] - hidden[:-1]).square().mean()
    return activity * dropped.square().mean() + slowness * change


def language(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())
