"""Loss terms by name, and the objective that adds them up with weights from the settings."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

TERMS = {}


def term(side, name):
    def add(fn):
        TERMS[side, name] = fn
        return fn
    return add


@dataclass
class GanBatch:
    """What the terms of one step may look at."""
    real: torch.Tensor
    labels: torch.Tensor
    fake: torch.Tensor
    noise: torch.Tensor
    critic: torch.nn.Module
    real_out: tuple = None
    fake_out: tuple = None


@term("generator", "adversarial")
def generator_adversarial(batch):
    return F.softplus(-batch.fake_out[0]).mean()


@term("generator", "class")
def generator_class(batch):
    return F.cross_entropy(batch.fake_out[1], batch.labels)


@term("generator", "features")
def feature_matching(batch):
    """Distance between the per-class means of the real and generated feature maps."""
    onehot = F.one_hot(batch.labels, batch.fake_out[1].shape[1]).float()
    share = onehot / onehot.sum(0).clamp_min(1.0)
    total = 0.0
    for real, fake in zip(batch.real_out[2], batch.fake_out[2]):
        total = total + F.l1_loss(share.t() @ fake, share.t() @ real.detach())
    return total


@term("generator", "diversity")
def diversity(batch):
    half = len(batch.fake) // 2
    moved = (batch.fake[:half] - batch.fake[half:2 * half]).abs().mean(1)
    apart = (batch.noise[:half] - batch.noise[half:2 * half]).abs().mean(1)
    return (apart / (moved + 0.1)).mean()


@term("critic", "adversarial")
def critic_adversarial(batch):
    return F.softplus(-batch.real_out[0]).mean() + F.softplus(batch.fake_out[0]).mean()


@term("critic", "class")
def critic_class(batch):
    return F.cross_entropy(batch.real_out[1], batch.labels)


@term("critic", "r1")
def gradient_penalty(batch):
    real = batch.real.detach().requires_grad_(True)
    score = batch.critic(real)[0].sum()
    slope, = torch.autograd.grad(score, real, create_graph=True)
    return slope.pow(2).sum(1).mean()


class Objective:
    """Weighted sum of the terms of one side; `start` delays a term, `cap` bounds its value."""

    def __init__(self, side, settings):
        self.side = side
        self.settings = settings
        self.meter = {name: [] for name in settings}

    def __call__(self, batch, step):
        total = batch.fake.new_zeros(())
        for name, setting in self.settings.items():
            if step < setting.start:
                continue
            value = TERMS[self.side, name](batch)
            self.meter[name].append(value.item())
            if setting.cap is not None:
                value = min(value.item(), setting.cap)
            total = total + setting.weight * value
        return total

    def summary(self, last=6):
        means = {name: sum(v[-last:]) / len(v[-last:]) for name, v in self.meter.items() if v}
        return ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
