"""Adversarial, feature and penalty terms."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def critic_hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()


def generator_hinge(fake: torch.Tensor) -> torch.Tensor:
    return -fake.mean()


def gradient_penalty(critic, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Two-sided penalty on the slope between real and generated images."""
    mix = torch.rand(real.shape[0], 1, 1, 1)
    inputs = torch.lerp(real.detach(), fake.detach(), mix).requires_grad_(True)
    score = critic.score(critic.features(inputs))
    (slope,) = torch.autograd.grad(score.sum(), inputs, create_graph=True)
    norm = slope.flatten(1).square().sum(dim=1).add(1e-12).sqrt()
    return (norm - 1.0).square().mean()


def feature_matching(fake: list[torch.Tensor], real: list[torch.Tensor]) -> torch.Tensor:
    terms = [F.l1_loss(f.mean(dim=0), r.detach().mean(dim=0)) for f, r in zip(fake, real, strict=True)]
    return torch.stack(terms).mean()
