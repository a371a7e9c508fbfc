"""Trains a small conditional GAN on curves; critic heads share one feature extractor."""
import argparse
import logging
import os
import tempfile

import torch

from config import GanConfig
from data import CurveSource
from losses import GanBatch, Objective
from models import Average, Critic, Generator

torch.set_num_threads(1)
log = logging.getLogger("gan")


class GanTrainer:
    def __init__(self, cfg):
        self.cfg = cfg
        self.source = CurveSource(cfg.classes, cfg.points, cfg.seed)
        self.generator = Generator(cfg.noise, cfg.classes, cfg.hidden, self.source.width)
        self.critic = Critic(self.source.width, cfg.hidden, cfg.classes)
        self.average = Average(self.generator, cfg.ema)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), cfg.lr_g, betas=cfg.betas)
        self.opt_d = torch.optim.Adam(self.critic.parameters(), cfg.lr_d, betas=cfg.betas)
        self.schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.98) for o in (self.opt_g, self.opt_d)]
        self.goal_g = Objective("generator", cfg.generator_terms)
        self.goal_d = Objective("critic", cfg.critic_terms)

    def _batch(self, real, labels, train_generator):
        noise = self.generator.sample_noise(labels)
        with torch.set_grad_enabled(train_generator):
            fake = self.generator(noise, labels)
        batch = GanBatch(real, labels, fake, noise, self.critic)
        batch.real_out = self.critic(real)
        batch.fake_out = self.critic(fake)
        return batch

    def critic_step(self, real, labels, step):
        batch = self._batch(real, labels, train_generator=False)
        loss = self.goal_d(batch, step)
        self.opt_d.zero_grad()
        loss.backward()
        self.opt_d.step()
        return loss.item()

    def generator_step(self, real, labels, step):
        self.critic.requires_grad_(False)
        batch = self._batch(real, labels, train_generator=True)
        loss = self.goal_g(batch, step)
        self.opt_g.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 5.0)
        self.opt_g.step()
        self.critic.requires_grad_(True)
        self.average.update(self.generator)
        return loss.item()

    def fit(self):
        for step in range(self.cfg.steps):
            real, labels = self.source.batch(self.cfg.batch_size)
            loss_d = self.critic_step(real, labels, step)
            loss_g = self.generator_step(real, labels, step)
            for schedule in self.schedules:
                schedule.step()
            if (step + 1) % 6 == 0:
                log.info("step %d: critic %.3f, generator %.3f [%s]", step + 1, loss_d, loss_g,
                         self.goal_g.summary())

    @torch.no_grad()
    def evaluate(self, size=96):
        real, labels = self.source.batch(size)
        fake = self.average.model(self.generator.sample_noise(labels), labels)
        gap = 0.0
        for kind in range(self.cfg.classes):
            mask = labels == kind
            gap += (real[mask].mean(0) - fake[mask].mean(0)).norm().item() / self.cfg.classes
        guess = self.critic(real)[1].argmax(-1)
        return {"gap": gap, "class accuracy": (guess == labels).float().mean().item()}

    def save(self, folder):
        path = os.path.join(folder, "gan.pt")
        torch.save({"generator": self.average.model.state_dict(), "critic": self.critic.state_dict()}, path)
        return path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=GanConfig.steps)
    parser.add_argument("--seed", type=int, default=GanConfig.seed)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    cfg = GanConfig(steps=options.steps, seed=options.seed)
    torch.manual_seed(cfg.seed)
    trainer = GanTrainer(cfg)
    trainer.fit()
    for name, value in trainer.evaluate().items():
        log.info("%s %.4f", name, value)
    with tempfile.TemporaryDirectory() as folder:
        log.info("saved %s", os.path.basename(trainer.save(folder)))


if __name__ == "__main__":
    main()
