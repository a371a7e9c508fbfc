"""Keyword-spotting networks on 12 x 40 spectrogram patches."""

import torch
from torch import nn
from torch.nn import functional as F


class SeparableBlock(nn.Module):
    def __init__(self, cin, cout, stride=1, dropout=0.1):
        super().__init__()
        self.depth = nn.Conv1d(cin, cin, 5, padding=2, stride=stride, groups=cin, bias=False)
        self.point = nn.Conv1d(cin, cout, 1, bias=False)
        self.norm = nn.BatchNorm1d(cout)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(F.relu(self.norm(self.point(self.depth(x)))))


class Teacher(nn.Module):
    def __init__(self, bands=12, width=48, classes=6):
        super().__init__()
        self.stem = SeparableBlock(bands, width, dropout=0.0)
        self.body = nn.Sequential(
            SeparableBlock(width, width, 2, 0.0),
            SeparableBlock(width, width, 2, 0.0),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean(-1))


class Student(nn.Module):
    """``align`` maps the student's features to the width of the teacher for the hint loss.

    It is dropped by :meth:`export`.
    """

    def __init__(self, bands=12, width=16, teacher_width=48, classes=6):
        super().__init__()
        self.stem = SeparableBlock(bands, width)
        self.body = nn.Sequential(SeparableBlock(width, width, 2), SeparableBlock(width, width, 2))
        self.align = nn.Sequential(nn.Conv1d(width, teacher_width, 1), nn.BatchNorm1d(teacher_width))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        feat = self.body(self.stem(x))
        if self.training:
            self.align(feat)
        return self.head(feat.mean(-1))

    def export(self):
        return {k: v.detach().cpu() for k, v in self.state_dict().items() if not k.startswith("align.")}


def pretrain(teacher, batches, lr=5e-3):
    """A few quick steps so that the teacher is better than chance."""
    opt = torch.optim.Adam(teacher.parameters(), lr=lr)
    for x, y in batches:
        opt.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        opt.step()
    teacher.eval()
    for p in teacher.parameters():
        p.requires_grad_(False)
    return teacher
