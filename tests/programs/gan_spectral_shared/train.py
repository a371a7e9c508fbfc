"""Train a conditional GAN with a shared critic trunk."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from config import Config
from data import Blobs, augment
from losses import critic_hinge, feature_matching, generator_hinge, gradient_penalty
from models import Averaged, Critic, Generator

log = logging.getLogger("gan")


@contextlib.contextmanager
def frozen(module: torch.nn.Module):
    """Spare the weight gradients of a module while gradients pass through it."""
    module.requires_grad_(False)
    try:
        yield module
    finally:
        module.requires_grad_(True)


class Trainer:
    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.generator = Generator(cfg.latent, cfg.classes, cfg.width, cfg.image, cfg.blocks)
        self.critic = Critic(cfg.classes, cfg.width)
        self.average = Averaged(self.generator, cfg.ema_decay)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), lr=cfg.lr_g, betas=(0.0, 0.99))
        self.opt_d = torch.optim.Adam(self.critic.parameters(), lr=cfg.lr_d, betas=(0.0, 0.99))
        self.sched = torch.optim.lr_scheduler.LinearLR(self.opt_g, 0.5, 1.0, total_iters=4)
        self.data = Blobs(cfg.image, cfg.classes, cfg.seed)
        self.history: list[dict[str, float]] = []

    def critic_step(self, step: int, real: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        with torch.no_grad():
            fake, _ = self.generator.sample(self.cfg.batch, self.cfg.classes)
        real_score, real_logits, _ = self.critic(augment(real))
        fake_score, _, _ = self.critic(augment(fake))
        loss = critic_hinge(real_score, fake_score) + F.cross_entropy(real_logits, y)
        penalty = torch.zeros(())
        if step % self.cfg.penalty_every == 0:
            penalty = gradient_penalty(self.critic, real, fake)
            loss = loss + self.cfg.penalty_weight * self.cfg.penalty_every * penalty
        self.opt_d.zero_grad(set_to_none=True)
        loss.backward()
        self.opt_d.step()
        accuracy = (real_logits.argmax(dim=1) == y).float().mean().item()
        return {"d_loss": loss.item(), "penalty": penalty.item(), "acc": accuracy}

    def generator_step(self, real: torch.Tensor) -> dict[str, float]:
        with frozen(self.critic):
            fake, y = self.generator.sample(self.cfg.batch, self.cfg.classes)
            score, logits, feats = self.critic(augment(fake))
            with torch.no_grad():
                real_feats = self.critic.features(augment(real))
            loss = generator_hinge(score)
            loss = loss + self.cfg.class_weight * F.cross_entropy(logits, y)
            loss = loss + self.cfg.feature_weight * feature_matching(feats, real_feats)
            self.opt_g.zero_grad(set_to_none=True)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 5.0)
        self.opt_g.step()
        self.sched.step()
        self.average.update(self.generator)
        return {"g_loss": loss.item(), "g_norm": float(norm)}

    @torch.no_grad()
    def evaluate(self, count: int = 64) -> float:
        """Sliced distance between generated and real images."""
        real, _ = self.data.batch(count)
        fake, _ = self.average.module.sample(count, self.cfg.classes)
        directions = F.normalize(torch.randn(real[0].numel(), 16), dim=0)
        a = (real.flatten(1) @ directions).sort(dim=0).values
        b = (fake.flatten(1) @ directions).sort(dim=0).values
        return (a - b).abs().mean().item()

    def save(self, folder: Path) -> Path:
        path = folder / "gan.pt"
        torch.save({"g": self.generator.state_dict(), "d": self.critic.state_dict()}, path)
        return path

    def fit(self) -> None:
        for step in range(self.cfg.steps):
            real, y = self.data.batch(self.cfg.batch)
            row = self.critic_step(step, real, y) | self.generator_step(real)
            if (step + 1) % self.cfg.eval_every == 0:
                row["swd"] = self.evaluate()
            self.history.append(row)
            log.info("step %d %s", step, {k: round(v, 4) for k, v in row.items()})


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = Config.from_args()
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    trainer = Trainer(cfg)
    trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        state = torch.load(trainer.save(Path(folder)), weights_only=True)
        trainer.generator.load_state_dict(state["g"])
    gates = [round(b.gate.item(), 5) for b in trainer.generator.blocks]
    log.info("gates %s, distance %.4f", gates, trainer.evaluate())


if __name__ == "__main__":
    main()
