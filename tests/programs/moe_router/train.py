"""Train the mixture on very small batches."""

from __future__ import annotations

import logging
import tempfile
from functools import wraps
from pathlib import Path

import torch
import torch.nn.functional as F
from config import TrainConfig, read
from data import Sequences
from model import Classifier
from routing import MixtureOfExperts

log = logging.getLogger("moe")


def in_eval_mode(function):
    """Runs a method of the trainer without gradients and with the model in eval mode."""

    @wraps(function)
    def wrapper(self, *args, **kwargs):
        was = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return function(self, *args, **kwargs)
        finally:
            self.model.train(was)

    return wrapper


class Trainer:
    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg
        self.model = Classifier(cfg.model)
        self.data = Sequences(cfg.model.vocab, cfg.model.length, cfg.model.classes, cfg.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.lr, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, cfg.lr, total_steps=cfg.steps)

    @property
    def mixtures(self) -> list[MixtureOfExperts]:
        return [m for m in self.model.modules() if isinstance(m, MixtureOfExperts)]

    @in_eval_mode
    def evaluate(self, count: int = 64) -> float:
        tokens, label = self.data.batch(count)
        logits, _ = self.model(tokens)
        return (logits.argmax(dim=1) == label).float().mean().item()

    def step(self) -> tuple[float, float]:
        self.optimizer.zero_grad(set_to_none=True)
        losses, penalties = [], []
        for _ in range(self.cfg.accumulate):
            tokens, label = self.data.batch(self.cfg.batch)
            logits, penalty = self.model(tokens)
            loss = F.cross_entropy(logits, label, label_smoothing=0.05)
            ((loss + penalty) / self.cfg.accumulate).backward()
            losses.append(loss.detach())
            penalties.append(penalty.detach())
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()
        self.schedule.step()
        return torch.stack(losses).mean().item(), torch.stack(penalties).mean().item()

    def idle(self) -> int:
        """Experts without a gradient in this step."""
        experts = [e for m in self.mixtures for e in m.experts]
        return sum(all(p.grad is None for p in e.parameters()) for e in experts)

    def fit(self) -> None:
        for number in range(self.cfg.steps):
            loss, penalty = self.step()
            if (number + 1) % self.cfg.eval_every == 0:
                score = self.evaluate()
                log.info(
                    "%d loss %.3f penalty %.3f idle %d acc %.3f", number, loss, penalty, self.idle(), score
                )


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = read()
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    trainer = Trainer(cfg)
    trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(trainer.model.state_dict(), path)
        trainer.model.load_state_dict(torch.load(path, weights_only=True))
    for number, mixture in enumerate(trainer.mixtures):
        log.info("layer %d usage %s", number, mixture.usage.tolist())


if __name__ == "__main__":
    main()
