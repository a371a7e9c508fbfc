"""Moves a model from stage to stage: which parameters train, with which optimizer."""

import logging

import torch

log = logging.getLogger("stages")


class StageRunner:
    def __init__(self, model, weight_decay=1e-3):
        self.model, self.weight_decay = model, weight_decay
        self.optimizer = self.schedule = None

    def enter(self, stage, steps):
        """Set the flags first, then build optimizer and schedule over what trains."""
        for name, p in self.model.named_parameters():
            p.requires_grad_(stage.matches(name))
            p.grad = None
        self.optimizer = torch.optim.AdamW(self._groups(stage), lr=stage.lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=[g["lr"] for g in self.optimizer.param_groups], total_steps=steps
        )
        held = sum(p.numel() for g in self.optimizer.param_groups for p in g["params"])
        log.info("stage %s: %d values in %d groups", stage.name, held, len(self.optimizer.param_groups))

    def _groups(self, stage):
        groups = {}
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                continue
            key = (stage.factor(name), p.dim() > 1)
            groups.setdefault(key, []).append(p)
        return [
            {"params": ps, "lr": stage.lr * factor, "weight_decay": self.weight_decay if decay else 0.0}
            for (factor, decay), ps in groups.items()
        ]

    def step(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        held = [p for g in self.optimizer.param_groups for p in g["params"]]
        norm = torch.nn.utils.clip_grad_norm_(held, 2.0)
        self.optimizer.step()
        self.schedule.step()
        return float(norm)
