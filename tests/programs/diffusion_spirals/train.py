"""Train the denoiser on synthetic spirals."""

import logging
import math
import os
import tempfile

import torch
from torch import nn

from config import parse
from diffusion import GaussianDiffusion
from ema import WeightAverage
from unet import UNet

log = logging.getLogger("diffusion")


def spirals(count, size, generator):
    """Two-channel images: a bright arm and its mirror image, in [-1, 1]."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius, angle = (x**2 + y**2).sqrt(), torch.atan2(y, x)
    turn = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    tight = 4 + 4 * torch.rand(count, 1, 1, generator=generator)
    arm = torch.cos(angle[None] + tight * radius[None] + turn)
    return torch.stack([arm, arm.flip(-1)], dim=1)


def evaluate(model, diffusion, ema, images, cfg):
    gen = torch.Generator().manual_seed(cfg.seed + 99)
    with ema.average_weights(model) as averaged, torch.no_grad():
        loss, _ = diffusion.loss(averaged, images, generator=gen)
        sample = diffusion.sample(averaged, (2, 2, cfg.image, cfg.image), generator=gen)
    return {"val": loss.item(), "sample_std": sample.std().item()}


def main():
    cfg = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    gen = torch.Generator().manual_seed(cfg.seed)

    train, held = spirals(64, cfg.image, gen), spirals(8, cfg.image, gen)
    model = UNet(width=cfg.width)
    ema = WeightAverage(model, cfg.ema.decay, cfg.ema.warmup)
    diffusion = GaussianDiffusion(cfg.diffusion)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 1e-3}, {"params": plain, "weight_decay": 0.0}], lr=cfg.lr
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 5))

    best = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, cfg.steps + 1):
            pick = torch.randint(0, len(train), (cfg.batch,), generator=gen)
            loss, per_image = diffusion.loss(model, train[pick], generator=gen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            schedule.step()
            ema.update(model)
            if step % 4 == 0:
                log.info("step %2d loss %.4f worst %.3f norm %.3f", step, loss.item(),
                         per_image.max().item(), float(norm))
            if step % cfg.eval_every == 0:
                metrics = evaluate(model, diffusion, ema, held, cfg)
                log.info("eval %2d %s", step, {k: round(v, 4) for k, v in metrics.items()})
                if metrics["val"] < best:
                    best = metrics["val"]
                    torch.save({"ema": ema.state_dict()}, os.path.join(folder, "best.pt"))
    log.info("best %.4f", best)


if __name__ == "__main__":
    main()
