"""Self-supervised training with BYOL and SimSiam, one after the other."""

from __future__ import annotations

import argparse
import io
import logging

import torch
from callbacks import Callback, CollapseWatch, History, Neighbours
from config import PRESETS, Settings, preset
from data import Views
from models import METHODS

log = logging.getLogger("ssl")


def parameter_groups(model: torch.nn.Module, decay: float) -> list[dict]:
    """No weight decay for vectors and scalars."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


class Trainer:
    def __init__(self, cfg: Settings, callbacks: list[Callback]):
        torch.manual_seed(cfg.seed)
        self.cfg, self.callbacks = cfg, callbacks
        self.data = Views(cfg.dim, cfg.clusters, cfg.seed)
        self.model = METHODS[cfg.method](cfg)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, cfg.weight_decay), lr=cfg.lr)
        warm = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, 1.0, total_iters=cfg.warmup)
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, cfg.steps - cfg.warmup)
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [warm, rest], [cfg.warmup])

    def run(self) -> None:
        self.model.train()
        for step, batch in enumerate(self.data.batches(self.cfg.steps, self.cfg.batch)):
            out = self.model(*batch)
            loss = out["align"] + self.cfg.probe_weight * out["probe"]
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.trainable(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.model.after_step(step / self.cfg.steps)
            for callback in self.callbacks:
                callback.on_step(self, out)
        for callback in self.callbacks:
            callback.on_end(self)


def snapshot(model: torch.nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default=",".join(PRESETS))
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    for name in args.methods.split(","):
        history, neighbours = History(), Neighbours(PRESETS[name].knn)
        trainer = Trainer(preset(name, steps=args.steps), [history, CollapseWatch(), neighbours])
        trainer.run()
        log.info(
            "%s align %.3f probe %.3f knn %.3f (%d bytes)",
            name,
            history.mean("align"),
            history.mean("accuracy"),
            neighbours.accuracy,
            snapshot(trainer.model),
        )


if __name__ == "__main__":
    main()
