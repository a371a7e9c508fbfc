"""A small trunk with a cosine classifier that can take in new classes."""
import copy

import torch
import torch.nn.functional as F
from torch import nn


class Trunk(nn.Module):
    def __init__(self, features, hidden, embed, dropout=0.1):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden, embed),
        )

    def forward(self, x):
        return self.net(x)


class CosineHead(nn.Module):
    def __init__(self, embed, classes, scale=8.0):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(classes, embed) * 0.1)
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())

    @property
    def classes(self):
        return self.prototypes.shape[0]

    def forward(self, z):
        return self.log_scale.exp() * F.normalize(z, dim=-1) @ F.normalize(self.prototypes, dim=-1).t()


class IncrementalClassifier(nn.Module):
    def __init__(self, cfg, classes):
        super().__init__()
        self.trunk = Trunk(cfg.features, cfg.hidden, cfg.embed)
        self.head = CosineHead(cfg.embed, classes)

    def forward(self, x):
        return self.head(self.trunk(x))

    @torch.no_grad()
    def extend(self, classes):
        """Makes room for `classes` classes; the rows of the known ones are kept."""
        old = self.head
        if classes <= old.classes:
            return False
        wider = CosineHead(old.prototypes.shape[1], classes).to(old.prototypes.device)
        wider.prototypes[: old.classes].copy_(old.prototypes)
        wider.log_scale.copy_(old.log_scale)
        self.head = wider
        return True

    def snapshot(self):
        """A frozen copy that serves as the teacher of the next stage."""
        teacher = copy.deepcopy(self).eval()
        for param in teacher.parameters():
            param.requires_grad_(False)
        return teacher
