"""Exponential moving average of the weights, with a swap for evaluation."""

from contextlib import contextmanager

import torch


class WeightAverage:
    """Keeps a shadow of every floating tensor of ``model.state_dict()``."""

    def __init__(self, model, decay=0.999, warmup=0):
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @property
    def current_decay(self):
        if self.updates < self.warmup:
            return min(self.decay, (1 + self.updates) / (10 + self.updates))
        return self.decay

    @torch.no_grad()
    def update(self, model):
        d = self.current_decay
        for key, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                self.shadow[key].lerp_(value, 1 - d)
            else:
                self.shadow[key].copy_(value)
        self.updates += 1

    def copy_to(self, model):
        with torch.no_grad():
            for key, value in model.state_dict().items():
                value.copy_(self.shadow[key])

    @contextmanager
    def average_weights(self, model):
        """Evaluate with the averaged weights, then put the training weights back."""
        training = model.training
        backup = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.copy_to(model)
        model.eval()
        try:
            yield model
        finally:
            model.load_state_dict(backup, strict=True, assign=True)
            model.train(training)

    def state_dict(self):
        return {"decay": self.decay, "updates": self.updates, "shadow": self.shadow}
