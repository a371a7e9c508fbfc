"""Learn eight points on a circle with a Wasserstein GAN whose critic is held by a gradient penalty.

python examples/wgan_gp.py
python examples/wgan_gp.py --penalty 0
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import gradctl


def real(count: int) -> Tensor:
    """Points near eight centres on the unit circle, [count, 2]."""
    angle = 2 * math.pi * torch.randint(8, (count,)) / 8
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(count, 2)


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def modes(points: Tensor) -> tuple[int, float]:
    """How many centres have at least 4 % of the points near them, and the share of points that are near any."""
    angle = 2 * math.pi * torch.arange(8) / 8
    distance, nearest = torch.cdist(points, torch.stack([angle.cos(), angle.sin()], dim=1)).min(dim=1)
    near = distance < 0.25
    counts = torch.bincount(nearest[near], minlength=8)
    return int((counts >= 0.04 * len(points)).sum()), float(near.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="steps of the generator")
    parser.add_argument("--critic-steps", type=int, default=3, help="steps of the critic before each of these")
    parser.add_argument("--penalty", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator, critic = network(8, 2), network(2, 1)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    between = real(options.batch).requires_grad_()
    for _ in range(options.steps):
        for _ in range(options.critic_steps):
            data, fake = real(options.batch), generator(torch.randn(options.batch, 8)).detach()
            share = torch.rand(options.batch, 1)
            between = (share * data + (1 - share) * fake).requires_grad_()
            outputs = critic(between)
            penalty = gradctl.gradient_penalty(outputs, between)
            loss = critic(fake).mean() - critic(data).mean() + options.penalty * penalty
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        generator_optimizer.zero_grad()
        (-critic(generator(torch.randn(options.batch, 8))).mean()).backward()
        generator_optimizer.step()
    slope = torch.autograd.grad(critic(between).sum(), between)[0].norm(dim=1).mean()
    with torch.no_grad():
        found, near = modes(generator(torch.randn(2000, 8)))
    print(f"mean slope of the critic: {float(slope):.2f}")
    print(f"modes found: {found} of 8; points near one: {100 * near:.0f}%")


if __name__ == "__main__":
    main()
