"""Distil a wide keyword spotter into a narrow one."""

import argparse
import logging
import os
import tempfile
from dataclasses import dataclass, field

import torch
from torch import nn

from losses import Objective
from nets import Student, Teacher, pretrain
from taps import attach

log = logging.getLogger("distill")


@dataclass
class DistillConfig:
    seed: int = 3
    steps: int = 20
    batch: int = 24
    lr: float = 0.05
    temperature: float = 3.0
    weights: dict = field(
        default_factory=lambda: {"label": 0.5, "soft": 0.5, "hint": 1.0, "relation": 0.5}
    )
    student_taps: dict = field(
        default_factory=lambda: {"hint": ("pooled", "align"), "relation": ("relation", "body.1")}
    )
    teacher_taps: dict = field(
        default_factory=lambda: {"hint": ("pooled", "body.1"), "relation": ("relation", "body.1")}
    )


class Keywords:
    """Class-dependent ridges over time with noise and a random shift."""

    def __init__(self, classes=6, bands=12, frames=40, seed=0):
        self.gen = torch.Generator().manual_seed(seed)
        level = torch.randn(classes, bands, 1, generator=self.gen)
        self.proto = level + 0.5 * torch.randn(classes, bands, frames, generator=self.gen)
        self.classes = classes

    def batch(self, count):
        y = torch.randint(0, self.classes, (count,), generator=self.gen)
        shift = int(torch.randint(-3, 4, (1,), generator=self.gen))
        x = self.proto[y].roll(shift, dims=-1)
        return x + 0.8 * torch.randn(x.shape, generator=self.gen), y


@torch.no_grad()
def accuracy(model, batches):
    was = model.training
    model.eval()
    hits = torch.cat([(model(x).argmax(-1) == y).float() for x, y in batches])
    model.train(was)
    return hits.mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=DistillConfig.steps)
    parser.add_argument("--seed", type=int, default=DistillConfig.seed)
    cfg = DistillConfig(**vars(parser.parse_args()))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)

    data = Keywords(seed=cfg.seed)
    held = [data.batch(48) for _ in range(2)]
    teacher = pretrain(Teacher(), [data.batch(48) for _ in range(12)])
    log.info("teacher accuracy %.3f", accuracy(teacher, held))

    student = Student()
    taps = {"student": attach(student, cfg.student_taps), "teacher": attach(teacher, cfg.teacher_taps)}
    objective = Objective(cfg)
    optimizer = torch.optim.SGD(student.parameters(), lr=cfg.lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=cfg.lr, total_steps=cfg.steps)

    student.train()
    for step in range(1, cfg.steps + 1):
        x, y = data.batch(cfg.batch)
        for group in taps.values():
            for tap in group.values():
                tap.clear()
        with torch.no_grad():
            teacher_logits = teacher(x)
        batch = {"y": y, "teacher_logits": teacher_logits, "student_logits": student(x), **taps}
        loss, parts = objective(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 5 == 0:
            log.info("step %2d loss %.3f %s", step, loss.item(), {k: round(v, 3) for k, v in parts.items()})

    log.info("student accuracy %.3f", accuracy(student, held))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(student.export(), os.path.join(folder, "student.pt"))
    for group in taps.values():
        for tap in group.values():
            tap.close()


if __name__ == "__main__":
    main()
