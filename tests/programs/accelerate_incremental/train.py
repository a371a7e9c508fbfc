"""Class-incremental training of a small classifier with accelerate."""
import argparse
import logging
import os
import tempfile
from collections import defaultdict

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from config import IncrementalConfig
from data import ClusterWorld
from losses import IncrementalLoss
from models import IncrementalClassifier

torch.set_num_threads(1)
log = logging.getLogger("incremental")


def build_optimizer(model, cfg):
    decay, plain = [], []
    for param in model.parameters():
        (decay if param.ndim > 1 else plain).append(param)
    return torch.optim.SGD(
        [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=cfg.lr, momentum=cfg.momentum, nesterov=True,
    )


class Session:
    """Model, optimizer and schedule of a run, and what the stages do with them."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=cfg.accumulate)
        self.world = ClusterWorld(cfg.features, max(s.classes for s in cfg.stages), cfg.seed)
        self.criterion = IncrementalLoss(cfg)
        model = IncrementalClassifier(cfg, cfg.stages[0].classes)
        optimizer = build_optimizer(model, cfg)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=8, gamma=0.8)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    @property
    def raw_model(self):
        return self.accelerator.unwrap_model(self.model)

    def begin_stage(self, stage):
        train, test = self.world.loaders(stage, self.cfg.batch_size)
        if stage.classes > self.raw_model.head.classes:
            self.criterion.teacher = self.raw_model.snapshot()
            self.raw_model.extend(stage.classes)
        return self.accelerator.prepare(train, test)

    def train_epoch(self, loader):
        self.model.train()
        sums, batches = defaultdict(float), 0
        for x, labels in loader:
            with self.accelerator.accumulate(self.model):
                loss, parts = self.criterion(x, self.model(x), labels)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            for key, value in parts.items():
                sums[key] += value.item()
            batches += 1
        return {key: value / batches for key, value in sums.items()}

    @torch.no_grad()
    def evaluate(self, loader):
        self.model.eval()
        hits = total = 0
        for x, labels in loader:
            guess = self.model(x).argmax(-1)
            guess, labels = self.accelerator.gather_for_metrics((guess, labels))
            hits += (guess == labels).sum().item()
            total += len(labels)
        return hits / total

    def save(self, folder, stage):
        path = os.path.join(folder, f"{stage.name}.pt")
        self.accelerator.save(self.raw_model.state_dict(), path)
        return path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=IncrementalConfig.lr)
    parser.add_argument("--distill-weight", type=float, default=IncrementalConfig.distill_weight)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    cfg = IncrementalConfig(lr=options.lr, distill_weight=options.distill_weight)
    set_seed(cfg.seed)
    session = Session(cfg)
    with tempfile.TemporaryDirectory() as folder:
        for stage in cfg.stages:
            train_loader, test_loader = session.begin_stage(stage)
            for epoch in range(stage.epochs):
                means = session.train_epoch(train_loader)
                accuracy = session.evaluate(test_loader)
                text = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
                log.info("%s epoch %d: %s, accuracy %.3f", stage.name, epoch, text, accuracy)
            session.save(folder, stage)


if __name__ == "__main__":
    main()
