"""Things done between steps."""

from __future__ import annotations

import logging

import torch
from models import VQVAE
from settings import Settings

log = logging.getLogger("vq")


class Hook:
    def before(self, step: int) -> None: ...

    def after(self, step: int) -> None: ...


class RestartCodes(Hook):
    """Every few steps: move idle codes, and forget the optimizer's averages for them."""

    def __init__(self, model: VQVAE, optimizer: torch.optim.Optimizer, cfg: Settings):
        self.model, self.optimizer, self.cfg, self.moved = model, optimizer, cfg, 0

    def after(self, step: int) -> None:
        if (step + 1) % self.cfg.restart_every or step + 1 == self.cfg.steps:
            return
        dead = self.model.codebook.restart(self.cfg.restart_below)
        state = self.optimizer.state.get(self.model.codebook.table.weight, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name][dead] = 0.0
        self.moved += len(dead)
        log.info("step %d: %d codes moved", step, len(dead))


class QuantizeLate(Hook):
    """Turns the weight quantiser on after some steps in full precision."""

    def __init__(self, model: VQVAE, start: int):
        self.model, self.start = model, start

    def before(self, step: int) -> None:
        if step == self.start:
            self.model.set_quantization(True)
