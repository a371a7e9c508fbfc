"""Quantisation-aware training of a bearing-fault classifier on vibration windows."""

import argparse
import logging
import math
import os
import tempfile
from dataclasses import dataclass

import torch
from torch import nn

from quant import QuantConv, QuantLinear, export_int8, start_quantisation

log = logging.getLogger("bearing")


@dataclass
class QatConfig:
    seed: int = 11
    steps: int = 28
    float_steps: int = 10
    batch: int = 32
    lr: float = 5e-3
    weight_bits: int = 4
    act_bits: int = 8
    weight_rounding: str = "stochastic"
    act_rounding: str = "nearest"


class BearingNet(nn.Module):
    def __init__(self, cfg, classes=4, width=12):
        super().__init__()
        self.c1 = QuantConv(1, width, 9, cfg, stride=2, padding=4)
        self.n1 = nn.BatchNorm1d(width)
        self.c2 = QuantConv(width, width, 5, cfg, stride=2, padding=2)
        self.n2 = nn.BatchNorm1d(width)
        self.c3 = QuantConv(width, 2 * width, 5, cfg, stride=2, padding=2)
        self.drop = nn.Dropout(0.1)
        self.fc = QuantLinear(2 * width, classes, cfg)

    def forward(self, x):
        x = self.n1(self.c1(x))
        x = self.n2(self.c2(x))
        x = self.c3(x).mean(dim=-1)
        return self.fc(self.drop(x))


def vibration(count, generator, length=128):
    """Carrier plus class-dependent impacts, unit variance."""
    y = torch.randint(0, 4, (count,), generator=generator)
    t = torch.arange(length).float()
    phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
    rate = torch.tensor([0.0, 0.11, 0.19, 0.31])[y][:, None]
    carrier = torch.sin(0.5 * t[None] + phase)
    impacts = torch.relu(torch.sin(2 * math.pi * rate * t[None] + phase)) ** 4
    x = carrier + 2.0 * impacts + 0.3 * torch.randn(count, length, generator=generator)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x[:, None], y


@torch.no_grad()
def evaluate(model, x, y):
    model.eval()
    logits = model(x)
    model.train()
    return (logits.argmax(1) == y).float().mean().item(), nn.functional.cross_entropy(logits, y).item()


def groups(model, lr):
    """Step sizes move slower and without weight decay."""
    steps = [p for n, p in model.named_parameters() if n.endswith("log_step")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("log_step")]
    return [{"params": rest, "lr": lr, "weight_decay": 1e-4},
            {"params": steps, "lr": 0.1 * lr, "weight_decay": 0.0}]


def main():
    parser = argparse.ArgumentParser()
    for name, default in vars(QatConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    cfg = QatConfig(**vars(parser.parse_args()))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    gen = torch.Generator().manual_seed(cfg.seed)

    model = BearingNet(cfg)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.02)
    optimizer = torch.optim.AdamW(groups(model, cfg.lr))
    held = vibration(128, gen)

    for step in range(1, cfg.steps + 1):
        if step == cfg.float_steps + 1:
            log.info("float accuracy %.3f loss %.3f", *evaluate(model, *held))
            log.info("quantising %d layers", start_quantisation(model))
            for group in optimizer.param_groups:
                group["lr"] *= 0.4
        x, y = vibration(cfg.batch, gen)
        loss = criterion(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        if step % 7 == 0:
            log.info("step %2d loss %.4f", step, loss.item())

    log.info("int8 accuracy %.3f loss %.3f", *evaluate(model, *held))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pt")
        torch.save(export_int8(model), path)
        log.info("exported %d bytes", os.path.getsize(path))


if __name__ == "__main__":
    main()
