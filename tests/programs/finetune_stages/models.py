"""Backbone, heads and a control branch that joins through zero convolutions."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn


def zero_module(module: nn.Module) -> nn.Module:
    """The branch behind this module says nothing until it has learned something."""
    for p in module.parameters():
        p.data.zero_()
    return module


def conv_block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Backbone(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.stem = conv_block(1, width, 1)
        self.stages = nn.ModuleList([conv_block(width, width, 2), conv_block(width, 2 * width, 2)])

    def forward(self, x: torch.Tensor, hints: list[torch.Tensor] | None = None) -> torch.Tensor:
        x = self.stem(x)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if hints is not None:
                x = x + hints[number]
        return x.mean(dim=(2, 3))


class Control(nn.Module):
    """Copies of the backbone's stages that see a second picture."""

    def __init__(self, backbone: Backbone, width: int):
        super().__init__()
        self.entry = zero_module(nn.Conv2d(1, 1, 1))
        self.stem = copy.deepcopy(backbone.stem)
        self.stages = copy.deepcopy(backbone.stages)
        self.exits = nn.ModuleList(
            zero_module(nn.Conv2d(channels, channels, 1)) for channels in (width, 2 * width)
        )

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> list[torch.Tensor]:
        h, hints = self.stem(x + self.entry(condition)), []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            h = stage(h)
            hints.append(leave(h))
        return hints


class Student(nn.Module):
    def __init__(self, backbone: Backbone, width: int, classes: int):
        super().__init__()
        self.backbone = backbone
        self.control = Control(backbone, width)
        self.head = nn.Linear(2 * width, classes)
        self.orientation = nn.Linear(2 * width, 4)
        self.use_control = False

    def features(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        hints = self.control(x, condition) if self.use_control else None
        return self.backbone(x, hints)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x, condition))

    def rotation_logits(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.orientation(self.features(x, condition))

    def train(self, mode: bool = True) -> Student:
        """Frozen normalisation layers keep their statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self


class Teacher(nn.Module):
    """A frozen linear model on fixed random features of both pictures."""

    def __init__(self, image: int, classes: int):
        super().__init__()
        self.lift = nn.Linear(2 * image * image, 128)
        self.out = nn.Linear(128, classes)
        self.requires_grad_(False).eval()

    def embed(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return torch.tanh(2.0 * self.lift(torch.cat([x, condition], dim=1).flatten(1)))

    @torch.no_grad()
    def fit(self, x: torch.Tensor, condition: torch.Tensor, label: torch.Tensor) -> None:
        h = self.embed(x, condition)
        target = 4.0 * F.one_hot(label, self.out.out_features).float()
        ridge = h.T @ h + 1.0 * torch.eye(h.shape[1])
        self.out.weight.copy_(torch.linalg.solve(ridge, h.T @ target).T)
        self.out.bias.zero_()

    @torch.no_grad()
    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(x, condition))
