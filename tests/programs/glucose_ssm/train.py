"""Predict the glucose level half an hour ahead from an irregular log."""

import argparse
import logging
import os
import tempfile
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F

from discretise import RULES
from series import GlucoseLog
from ssm import GlucoseNet

log = logging.getLogger("glucose")


@dataclass
class SsmConfig:
    seed: int = 17
    steps: int = 26
    batch: int = 12
    lr: float = 5e-3
    rule: str = "zoh"
    clip: float = 1.0
    log_every: int = 4

    @classmethod
    def from_args(cls, argv=None):
        parser = argparse.ArgumentParser()
        parser.add_argument("--steps", type=int, default=cls.steps)
        parser.add_argument("--seed", type=int, default=cls.seed)
        parser.add_argument("--rule", choices=sorted(RULES), default=cls.rule)
        return cls(**vars(parser.parse_args(argv)))


class Meter:
    """Moving average of scalars, for the log."""

    def __init__(self, momentum=0.7):
        self.momentum, self.values = momentum, {}

    def update(self, **scalars):
        for key, value in scalars.items():
            value = float(value)
            old = self.values.get(key, value)
            self.values[key] = self.momentum * old + (1 - self.momentum) * value

    def __str__(self):
        return " ".join(f"{k} {v:.4f}" for k, v in self.values.items())


@torch.no_grad()
def evaluate(model, batches):
    was = model.training
    model.eval()
    error = torch.cat([(model(b) - b.target).abs() for b in batches])
    model.train(was)
    return error.mean().item()


def groups(model):
    rates = [p for n, p in model.named_parameters() if n.endswith("log_rate")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("log_rate")]
    return [{"params": rest, "weight_decay": 1e-3}, {"params": rates, "weight_decay": 0.0}]


def main():
    cfg = SsmConfig.from_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)

    data = GlucoseLog(cfg.seed)
    held_log = GlucoseLog(cfg.seed + 1)
    held = [held_log.batch(24) for _ in range(2)]
    model = GlucoseNet(rule=cfg.rule)
    optimizer = torch.optim.AdamW(groups(model), lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.6)
    meter = Meter()

    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, cfg.steps + 1):
            batch = data.batch(cfg.batch)
            loss = F.smooth_l1_loss(model(batch), batch.target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            schedule.step()
            meter.update(loss=loss.detach(), norm=norm)
            if step % cfg.log_every == 0:
                log.info("step %2d %s held %.4f", step, meter, evaluate(model, held))
                state = {"model": model.state_dict(), "config": asdict(cfg)}
                torch.save(state, os.path.join(folder, "last.pt"))


if __name__ == "__main__":
    main()
