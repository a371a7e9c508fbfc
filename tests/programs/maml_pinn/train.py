"""Meta-learning for physics-informed networks, first order first and second order later."""

from __future__ import annotations

import io
import logging

import torch
from config import MetaConfig, load
from meta import MetaLearner
from model import Field
from problems import TaskSource

log = logging.getLogger("maml")


class Progress:
    """Running averages of what is logged."""

    def __init__(self, decay: float = 0.7):
        self.decay, self.values = decay, {}

    def update(self, **values: float) -> None:
        for name, value in values.items():
            old = self.values.get(name, value)
            self.values[name] = self.decay * old + (1 - self.decay) * value

    def __str__(self) -> str:
        return " ".join(f"{k}={v:.4f}" for k, v in self.values.items())


def validate(learner: MetaLearner, cfg: MetaConfig) -> tuple[float, float]:
    tasks = TaskSource(cfg.family, 1000, cfg.boundary_weight).draw(4)
    points = torch.linspace(0, 1, cfg.points).unsqueeze(1)
    pairs = [learner.adapted_error(task, points) for task in tasks]
    return tuple(sum(p) / len(p) for p in zip(*pairs, strict=True))


def train(cfg: MetaConfig) -> MetaLearner:
    learner = MetaLearner(Field(cfg.width, cfg.depth), cfg.inner_lr, cfg.inner_steps)
    groups = [
        {"params": learner.net.parameters(), "lr": cfg.outer_lr},
        {"params": learner.log_lr.parameters(), "lr": 5 * cfg.outer_lr},
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.iterations, eta_min=1e-4)
    source = TaskSource(cfg.family, cfg.seed, cfg.boundary_weight)
    progress = Progress()
    for iteration in range(cfg.iterations):
        first_order = iteration < cfg.first_order_until
        optimizer.zero_grad()
        total = 0.0
        for task in source.draw(cfg.tasks):
            support, query = torch.rand(2, cfg.points, 1).unbind(0)
            loss = learner.meta_loss(task, support, query, first_order) / cfg.tasks
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), cfg.clip)
        optimizer.step()
        schedule.step()
        progress.update(loss=total, norm=norm.item())
        if iteration % 4 == 0:
            log.info("iteration %d %s %s", iteration, "first" if first_order else "second", progress)
    return learner


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    cfg = load()
    torch.manual_seed(cfg.seed)
    learner = train(cfg)
    before, after = validate(learner, cfg)
    rates = torch.stack([r.detach().exp() for r in learner.log_lr])
    buffer = io.BytesIO()
    torch.save(learner.state_dict(), buffer)
    log.info("error %.4f before, %.4f after adaptation", before, after)
    log.info("rates %.4f to %.4f, %d bytes", rates.min().item(), rates.max().item(), buffer.tell())


if __name__ == "__main__":
    main()
