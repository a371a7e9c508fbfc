"""Heteroscedastic regression of tariffs with a sparse mixture of experts."""

import logging
import os
import tempfile

import torch
from torch import nn
from torch.nn import functional as F

from model import TariffNet
from routing import RouterStats
from settings import from_args

log = logging.getLogger("tariff")


class Tariffs:
    """Rows of four segments with different price rules."""

    def __init__(self, features, generator):
        self.gen, self.features = generator, features
        self.rules = torch.randn(4, features, generator=generator)
        self.split = torch.randn(features, 4, generator=generator)

    def batch(self, count):
        x = torch.randn(count, self.features, generator=self.gen)
        segment = (x @ self.split).argmax(dim=1)
        y = (x * self.rules[segment]).sum(1) + 0.5 * segment.float()
        return x, y + 0.1 * torch.randn(count, generator=self.gen)


def objective(mean, log_scale, y):
    """Gaussian likelihood, weighted by the detached variance so that hard rows keep their say."""
    nll = F.gaussian_nll_loss(mean, y, (2 * log_scale).exp(), reduction="none")
    weight = (2 * log_scale).exp().detach().clamp(0.2, 5.0).sqrt()
    return (weight * nll).mean()


@torch.no_grad()
def evaluate(model, x, y):
    model.eval()
    mean, log_scale, _ = model(x)
    model.train()
    inside = ((mean - y).abs() < 1.64 * log_scale.exp()).float().mean()
    return {"rmse": round((mean - y).square().mean().sqrt().item(), 3), "cover": round(inside.item(), 3)}


def main():
    cfg = from_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    data = Tariffs(cfg.features, torch.Generator().manual_seed(cfg.seed))
    held = data.batch(256)

    model = TariffNet(cfg)
    stats = RouterStats(model, cfg.balance_rate)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=4),
         torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)],
        milestones=[4],
    )

    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, cfg.steps + 1):
            x, y = data.batch(cfg.batch)
            mean, log_scale, loads = model(x)
            loss = objective(mean, log_scale, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            stats.after_step(loads)
            if step % 6 == 0:
                log.info("step %2d loss %.3f %s load %s", step, loss.item(), evaluate(model, *held),
                         stats.imbalance())
        torch.save({"model": model.state_dict()}, os.path.join(folder, "last.pt"))


if __name__ == "__main__":
    main()
