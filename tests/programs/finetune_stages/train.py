"""Pretrain a backbone, then fine-tune it in stages on another task."""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from config import Plan
from data import Pictures
from models import Backbone, Student, Teacher
from stages import StagedOptimizer, stage_loss

log = logging.getLogger("stages")


def pretrain(plan: Plan, data: Pictures, path: Path) -> None:
    """Leaves the weights of the backbone at `path`; its source head is thrown away."""
    backbone = Backbone(plan.width)
    head = torch.nn.Linear(2 * plan.width, plan.source_classes)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=plan.pretrain_lr)
    for _ in range(plan.pretrain_steps):
        x, label = data.source(plan.batch, plan.source_classes)
        loss = F.cross_entropy(head(backbone(x)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log.info("pretrained: loss %.4f", loss.item())
    torch.save(backbone.state_dict(), path)


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Pictures, count: int = 64) -> float:
    was = model.training
    model.eval()
    x, condition, label = data.target(count)
    score = (model(x, condition).argmax(dim=1) == label).float().mean().item()
    model.train(was)
    return score


def fine_tune(plan: Plan, data: Pictures, path: Path) -> Student:
    backbone = Backbone(plan.width)
    backbone.load_state_dict(torch.load(path, weights_only=True))
    student = Student(backbone, plan.width, plan.classes)
    teacher = Teacher(plan.image, plan.classes)
    teacher.fit(*data.target(256))
    log.info("teacher: accuracy %.3f", accuracy(teacher, data))
    staged = StagedOptimizer(student, plan)
    for stage in plan.stages:
        fresh = staged.enter(stage)
        sums: dict[str, float] = {}
        for _ in range(stage.steps):
            parts = stage_loss(stage, student, teacher, data.target(plan.batch), plan)
            staged.step(torch.stack(list(parts.values())).sum())
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item() / stage.steps
        shown = {name: round(value, 4) for name, value in sums.items()}
        log.info("%s: %d new tensors, accuracy %.3f, %s", stage.name, fresh, accuracy(student, data), shown)
    return student


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=Plan.batch)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    plan = replace(Plan(), **vars(parser.parse_args()))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    data = Pictures(plan.image, plan.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.pt"
        pretrain(plan, data, path)
        student = fine_tune(plan, data, path)
    exits = [leave.weight.detach().abs().mean().item() for leave in student.control.exits]
    log.info("exits %s", [f"{value:.5f}" for value in exits])


if __name__ == "__main__":
    main()
