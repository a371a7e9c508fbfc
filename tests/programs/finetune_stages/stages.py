"""Unfreezing, optimizer groups and the loss of each stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from config import Plan, Stage
from data import rotated
from models import Student, Teacher


def named_under(model: torch.nn.Module, prefix: str) -> list[torch.nn.Parameter]:
    return [p for n, p in model.named_parameters() if n == prefix or n.startswith(prefix + ".")]


class StagedOptimizer:
    """One AdamW for all stages: newly unfrozen parameters come as a new group."""

    def __init__(self, model: Student, plan: Plan):
        self.model, self.plan = model, plan
        self.known: set[int] = set()
        self.optimizer: torch.optim.AdamW | None = None
        model.requires_grad_(False)

    def enter(self, stage: Stage) -> int:
        fresh = [p for prefix in stage.unfreeze for p in named_under(self.model, prefix)]
        fresh = [p.requires_grad_(True) for p in fresh if id(p) not in self.known]
        self.known.update(id(p) for p in fresh)
        group = {"params": fresh, "lr": stage.lr, "weight_decay": self.plan.weight_decay}
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW([group])
        else:
            for old in self.optimizer.param_groups:
                old["lr"] *= 0.5
            self.optimizer.add_param_group(group)
        self.model.use_control = stage.control
        self.model.train()
        return len(fresh)

    def step(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        active = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(active, 2.0)
        self.optimizer.step()
        return norm.item()


def distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    soft = F.log_softmax(student / temperature, dim=1)
    target = F.softmax(teacher.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(soft, target, reduction="batchmean")


def stage_loss(stage: Stage, model: Student, teacher: Teacher, batch, plan: Plan) -> dict[str, torch.Tensor]:
    x, condition, label = batch
    logits = model(x, condition)
    parts = {"task": F.cross_entropy(logits, label)}
    if stage.distill:
        parts["distill"] = stage.distill * distillation(logits, teacher(x, condition), plan.temperature)
    if stage.auxiliary:
        turned, number = rotated(x)
        parts["rotation"] = 0.3 * F.cross_entropy(model.rotation_logits(turned, turned), number)
    return parts
