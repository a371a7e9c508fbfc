"""Callbacks: history of the loss parts, weight average, representation drift."""
import logging

import torch
import torch.nn.functional as F
from transformers import TrainerCallback

log = logging.getLogger(__name__)


class PartsRecorder(TrainerCallback):
    """Keeps the components of the loss of each step as plain numbers."""

    def __init__(self):
        self.trainer = None
        self.history = []

    def bind(self, trainer):
        self.trainer = trainer
        return self

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer is not None and self.trainer.parts:
            self.history.append((state.global_step, dict(self.trainer.parts)))


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trainable weights, for the final export."""

    def __init__(self, decay=0.9):
        self.decay = decay
        self.shadow = {}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            if name not in self.shadow:
                self.shadow[name] = param.detach().clone()
            else:
                self.shadow[name].lerp_(param.detach(), 1.0 - self.decay)


class RepresentationDrift(TrainerCallback):
    """How far the pooled representation of a fixed probe batch moves between evaluations."""

    def __init__(self, probe, limit):
        self.probe = probe
        self.limit = limit
        self.reference = None
        self.values = []

    def _embed(self, model):
        was_training = model.training
        model.eval()
        pooled = model.bert(**self.probe).pooler_output
        model.train(was_training)
        return F.normalize(pooled, dim=-1)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        previous = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        current = self._embed(model)
        if self.reference is None:
            self.reference = current
            log.info("step %d: reference representation stored", state.global_step)
            return control
        drift = 1.0 - (current * self.reference).sum(-1).mean().item()
        self.values.append((state.global_step, drift))
        log.info("step %d: drift %.4f", state.global_step, drift)
        if drift > self.limit:
            log.warning("drift above %.2f, stopping", self.limit)
            control.should_training_stop = True
        torch.set_grad_enabled(previous)
        return control
