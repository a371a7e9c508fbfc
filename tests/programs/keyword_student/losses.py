"""The terms of the distillation objective and their weighted sum."""

import torch
from torch.nn import functional as F

TERMS = {}


def term(name):
    def register(fn):
        TERMS[name] = fn
        return fn

    return register


@term("label")
def label_loss(batch, cfg):
    return F.cross_entropy(batch["student_logits"], batch["y"], label_smoothing=0.05)


@term("soft")
def soft_loss(batch, cfg):
    t = cfg.temperature
    target = (batch["teacher_logits"] / t).softmax(-1)
    return F.kl_div((batch["student_logits"] / t).log_softmax(-1), target, reduction="batchmean") * t * t


@term("hint")
def hint_loss(batch, cfg):
    """Match the aligned student features to the teacher's, both normalised."""
    ours = F.normalize(batch["student"]["hint"].value, dim=-1)
    theirs = F.normalize(batch["teacher"]["hint"].value, dim=-1)
    return (ours - theirs).pow(2).sum(-1).mean()


@term("relation")
def relation_loss(batch, cfg):
    ours, theirs = batch["student"]["relation"].value, batch["teacher"]["relation"].value
    return F.smooth_l1_loss(ours, theirs.detach())


class Objective:
    def __init__(self, cfg):
        self.cfg = cfg
        self.terms = {k: w for k, w in cfg.weights.items() if w > 0}

    def __call__(self, batch):
        parts = {name: TERMS[name](batch, self.cfg) for name in self.terms}
        total = torch.stack([self.terms[k] * v for k, v in parts.items()]).sum()
        return total, {k: v.item() for k, v in parts.items()}
